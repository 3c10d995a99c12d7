"""Time a training step and its parts: python docs/time_step.py CONFIG.yaml [KEY=VALUE]... (with every term on).

Each part runs alone, forward and backward, best of two, in one process; their sum differs from the whole step.
"""

import sys
import time

import torch

from vqhit.data import training_batches
from vqhit.images import from_uint8
from vqhit.losses import discriminator_loss, generator_loss, r1_penalty
from vqhit.recipe import RunConfig
from vqhit.train import Trainer


def seconds(part, tries=2):
    """Seconds of the fastest call."""
    times = []
    for _ in range(tries):
        start = time.perf_counter()
        part()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def main(path, overrides):
    """Print the time of a whole step, and of its parts with their shares."""
    trainer = Trainer(RunConfig.from_yaml(path, overrides))
    size = trainer.config.train.batch_size
    batches = iter(training_batches(trainer.feed.crops, size, 0, 100, trainer.config.data.workers))
    images = from_uint8(next(batches).images).to(trainer.device)
    trainer.train_step(images)
    whole = seconds(lambda: trainer.train_step(images), tries=3)
    state, model, discriminator = trainer.state, trainer.state.model, trainer.state.discriminator
    latents = model.encode_latents(images).detach()

    def on_reconstructions():
        fakes = images.clone().requires_grad_()
        logits = discriminator(fakes)
        torch.autograd.grad(generator_loss(logits), fakes, retain_graph=True)
        discriminator_loss(logits, logits).backward(inputs=list(discriminator.parameters()))

    def r1():
        real = images.clone().requires_grad_()
        logits = discriminator(real)
        (logits.mean() + r1_penalty(logits, real)).backward()

    def update():
        for optimizer in state.optimizers.values():
            optimizer.gradient_norm()
            optimizer.step(state.step)
        if state.ema is not None:
            state.ema.update(model, state.step)

    parts = {
        "encoder": seconds(lambda: model.encode_latents(images).square().mean().backward()),
        "decoder": seconds(lambda: model.decode_latents(latents).square().mean().backward()),
        "perceptual": seconds(lambda: trainer.objective.perceptual(images.clone().requires_grad_(), images).backward()),
        "D on reconstructions": seconds(on_reconstructions),
        "D on photographs": seconds(lambda: discriminator(images).mean().backward()),
    }
    parts["R1"] = seconds(r1) - parts["D on photographs"]
    parts["Adam, average"] = seconds(update)
    parts["data"] = seconds(lambda: next(batches), tries=6)
    print(f"whole step: {whole:.3f} s; sum of its parts: {sum(parts.values()):.3f} s")
    for name, part in parts.items():
        print(f"{name}: {part:.3f} s, {part / sum(parts.values()):.0%}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])

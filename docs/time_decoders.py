"""Compare decoders side by side: python docs/time_decoders.py CONFIG.yaml CONFIG.yaml [KEY=VALUE]...

Every term of the loss is on from the first step; loss.adversarial=0 leaves the discriminator out.
Parameters and GFLOPs (two per multiply-add) of the decoders, images/s of decoding and of whole training steps. All run
in one process, in turns (A B A B ...), with random weights; medians over the rounds, and the range of their ratios.
"""

import statistics
import sys
import tempfile
import time

import torch

from vqhit.bench import count_gflops
from vqhit.images import from_uint8
from vqhit.recipe import RunConfig
from vqhit.train import Trainer

ROUNDS = 7
DECODED = 16  # images at a time


def seconds(part):
    """Seconds of one call."""
    start = time.perf_counter()
    part()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def decoder_gflops(model):
    """GFLOPs of decoding one image."""
    tokens = torch.zeros(1, *model.token_grid, dtype=torch.int64, device=model.quant_conv.weight.device)
    return count_gflops(lambda: model.eval().decode(tokens))


def main(paths, overrides):
    """Print one line for each configuration; the ratios are to the last one."""
    trainers, decodings, steps = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for index, path in enumerate(paths):
            changes = ["loss.discriminator_start_step=0", *overrides, f"run_dir={folder}/{index}"]
            trainer = Trainer(RunConfig.from_yaml(path, changes))
            batch = next(trainer.feed.batches())
            images = from_uint8(batch.images.to(trainer.device))
            model = trainer.state.model
            tokens = torch.randint(0, model.codebook_size, (DECODED, model.num_tokens)).to(trainer.device)
            trainers.append(trainer)
            steps.append(lambda trainer=trainer, images=images: trainer.train_step(images))
            decodings.append(lambda model=model, tokens=tokens: model.eval().decode(tokens))
        rounds = {"decode": [], "train": []}
        for _ in range(ROUNDS + 1):  # the first one warms up
            rounds["decode"].append([seconds(part) for part in decodings])
            for trainer in trainers:
                trainer.state.model.train()
            rounds["train"].append([seconds(part) for part in steps])
    for index, (path, trainer) in enumerate(zip(paths, trainers, strict=True)):
        model = trainer.state.model.eval()
        count = sum(parameter.numel() for part in model.decoder_parts for parameter in part.parameters()) / 1e6
        line = f"{path}: decoder {count:.2f} M parameters, {decoder_gflops(model):.3f} GFLOPs"
        for what, images in (("decode", DECODED), ("train", trainer.config.train.batch_size)):
            times = [times_of_round[index] for times_of_round in rounds[what][1:]]
            ratios = [times_of_round[-1] / times_of_round[index] for times_of_round in rounds[what][1:]]
            line += f"; {what} {images / statistics.median(times):.1f} images/s"
            if index < len(paths) - 1:
                spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
                line += f", {statistics.median(ratios):.2f} times the last ({spread})"
        print(line)


if __name__ == "__main__":
    configs = [argument for argument in sys.argv[1:] if "=" not in argument]
    if not configs:
        sys.exit("usage: python docs/time_decoders.py CONFIG.yaml CONFIG.yaml [KEY=VALUE]...")
    main(configs, [argument for argument in sys.argv[1:] if "=" in argument])

"""The configuration file of a training run."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, Strict, ValidationInfo, field_validator, model_validator

from vqhit.config import Config, ConfigError, Count, Flag, NonNegativeInt, Positive, Text, of_kind
from vqhit.convnet import ConvNetGeneratorConfig
from vqhit.data import DataConfig
from vqhit.discriminator import STDDEV_GROUP, DiscriminatorConfig
from vqhit.ema import EMAConfig
from vqhit.extractors import Extractor, InceptionExtractor, PooledExtractor, check_features
from vqhit.logs import LogConfig
from vqhit.metrics import SSIM_WINDOW
from vqhit.models import HiTGeneratorConfig, VQHiTConfig
from vqhit.objective import GANLossConfig, LossConfig
from vqhit.optimizer import OptimizerConfig
from vqhit.perceptual import FeaturesConfig
from vqhit.sources import SourceConfig

_MODELS: dict[str, type[Config]] = {
    "vqhit": VQHiTConfig,
    "hit_generator": HiTGeneratorConfig,
    "convnet_generator": ConvNetGeneratorConfig,
}


class EvalConfig(SourceConfig):
    """Images to evaluate on while training, with the model that would be saved.

    Of a tokenizer: PSNR, SSIM and codebook usage. With `fid`, or `features` and a file of that network's weights, also
    the Fréchet distance between features of the images and of their reconstructions, or of as many samples: a generator
    needs one of the two. Only with `fid` is it called FID.
    """

    every: Count = 5000
    """Steps between evaluations; the last step is one too."""
    images: Count = 1000
    """At most so many, evenly spaced: always the same ones."""
    fid: Flag = False
    """Also rFID; FID of a generator, of as many samples."""
    inception: Text | None = None
    """File of FID's network; without it torchvision's cache, or a download."""
    features: FeaturesConfig | None = None
    feature_weights: Text | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_features(self.features, self.feature_weights)
        if self.compares_features and self.images < 2:
            raise ValueError(f"images is {self.images}; a Fréchet distance needs at least 2")
        if self.fid and self.features is not None:
            raise ValueError("fid and features: FID has its own network; leave one out")
        if self.inception is not None and not self.fid:
            raise ValueError("inception: only fid needs it")
        return self

    @property
    def compares_features(self) -> bool:
        """Whether a Fréchet distance is measured."""
        return self.fid or self.features is not None

    def extractor(self, size: int) -> Extractor | None:
        """The network whose features of images of `size` px are compared; raises `ValueError` if it cannot be had."""
        if self.features is not None and self.feature_weights is not None:
            return PooledExtractor(self.features, self.feature_weights, size)
        return InceptionExtractor(self.inception, key="eval.inception") if self.fid else None


# What may change between the start of a run and its continuation; anything else would make it another run.
CHANGEABLE = (
    {"run_dir", "device", "loss.perceptual_weights", "eval"}
    | {f"data.{key}" for key in ("path", "max_bad", "workers", "cache_images")}
    | {f"eval.{key}" for key in EvalConfig.model_fields}
    | {f"eval.features.{key}" for key in FeaturesConfig.model_fields}
    | {f"log.{key}" for key in LogConfig.model_fields}
    | {f"train.{key}_every" for key in ("log", "grid", "checkpoint", "keep")}
    | {
        f"train.{key}"
        for key in ("keep_checkpoints", "max_minutes", "timeout_minutes", "compile", "activation_checkpointing")
    }
)


class TrainConfig(Config):
    """Length of a run and what it writes; 0 switches a periodic output off (the last step always saves)."""

    steps: Count
    batch_size: Count
    """Images of a step, over all processes."""
    micro_batch_size: Count | None = None
    """Images that pass through the networks of a process at a time, to bound memory; the gradients of a batch
    accumulate."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 runs the autoencoder or generator and the perceptual network under autocast; all else stays float32."""
    allow_tf32: Flag = False
    """On CUDA, let float32 convolutions and matrix products (the discriminator's, R1's) round to TF32."""
    compile: Flag = False
    """`torch.compile` the encoder, the decoder and the perceptual network, or the generator (not D: R1 needs a second
    derivative)."""
    activation_checkpointing: Flag = False
    """Keep only the inputs of the blocks of the encoder, decoder or generator for the backward pass, which computes the
    rest again: less memory, a longer step, the same numbers."""
    log_every: Count = 50
    grid_every: NonNegativeInt = 1000
    checkpoint_every: NonNegativeInt = 1000
    keep_checkpoints: Count = 3
    """The newest so many stay."""
    keep_every: NonNegativeInt = 0
    """Besides, those whose step is a multiple of this stay."""
    restart_codes_after: NonNegativeInt = 0
    """Move a code that no latent chose for this many steps onto a latent of the batch; 0 never does."""
    batch_norm_batches: NonNegativeInt = 0
    """Micro-batches, of images or of noise, for batch norm's statistics, taken before saving and evaluating; 0 keeps
    the running ones."""
    max_minutes: Positive | None = None
    """Stop, with a checkpoint, after this long in one go."""
    sync_batch_norm: Flag = True
    """With several processes: take the model's batch statistics over all of them (the official code: each its own)."""
    timeout_minutes: Annotated[float, Strict(), Field(ge=0.1, le=10_000)] = 10.0
    """With several processes: give up on one that has not been heard of for this long."""


class RunConfig(Config):
    """A configuration file of `vqhit train`."""

    run_dir: Text
    seed: NonNegativeInt = 0
    device: Text = "auto"
    """`auto` is CUDA if there is a device, else the CPU."""
    init_from: Text | None = None
    """Begin with a trained model: an id on the Hub (owner/name, owner/name@revision), a run's folder, or a model's. Its
    discriminator, optimizers, running means and, if this run keeps an average, the weights behind its own are taken too
    where they are there (`vqhit push --with-training-state`); steps and learning rate begin anew. With
    `ema.start_step: 0` its average goes on. A run that is continued does not look at it again."""
    freeze_tokens: Flag = False
    """Keep the encoder and codebook of `init_from` as they are: every image keeps its tokens, and only the decoder and
    the discriminator train. The decoder may be another one than there; then it begins anew, and so does all else."""
    model: VQHiTConfig | HiTGeneratorConfig | ConvNetGeneratorConfig
    """A tokenizer (`kind: vqhit`, the default), or a generator, which is trained as a GAN (`hit_generator`,
    `convnet_generator`)."""
    discriminator: DiscriminatorConfig | None = None
    """Needed for a generator, and for an adversarial term; its resolution is the model's."""
    data: DataConfig
    loss: LossConfig | GANLossConfig = Field(default=None, validate_default=True)
    """Of a tokenizer, or of a generator."""
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    discriminator_optimizer: OptimizerConfig | None = None
    """By default the same as `optimizer`."""
    ema: EMAConfig = Field(default_factory=lambda: EMAConfig(decay=0.0))
    """Off by default. With an average, it is what is evaluated and saved as the model."""
    train: TrainConfig
    eval: EvalConfig | None = None
    """Without it, nothing is evaluated while training."""
    log: LogConfig = Field(default_factory=LogConfig)

    @field_validator("model", mode="before")
    @classmethod
    def _choose_model(cls, model: Any) -> Any:
        return of_kind(model, _MODELS, default="vqhit")

    @field_validator("loss", mode="before")
    @classmethod
    def _choose_loss(cls, loss: Any, info: ValidationInfo) -> Any:
        """The kind of loss that the model needs; of a model that is refused, any, since one error is enough."""
        if (model := info.data.get("model")) is None:
            return LossConfig()
        kind: type[Config] = LossConfig if isinstance(model, VQHiTConfig) else GANLossConfig
        if loss is None or isinstance(loss, kind):
            return loss or kind()
        if not (isinstance(loss, Mapping) and all(isinstance(key, str) for key in loss)):
            raise ValueError(f"found {loss!r}; expected a mapping")
        return kind(**loss)

    @model_validator(mode="after")
    def _check(self) -> Self:
        model, resolution = self.model, self.model.image_size
        if self.discriminator is None and self.trains_discriminator:
            why = "loss.adversarial" if isinstance(self.loss, LossConfig) else f"a model of kind {model.kind}"
            raise ValueError(f"{why} needs a discriminator: give its sizes under `discriminator`")
        if self.discriminator is not None and self.discriminator.resolution != resolution:
            raise ValueError(
                f"discriminator.resolution {self.discriminator.resolution}: the model's images are {resolution} px"
            )
        if isinstance(model, VQHiTConfig):
            self._check_tokenizer(model)
        else:
            self._check_generator()
        self.images_at_a_time(processes=1)
        return self

    def _check_tokenizer(self, model: VQHiTConfig) -> None:
        if self.freeze_tokens and self.init_from is None:
            raise ValueError("freeze_tokens: which ones? init_from names the tokenizer whose encoder and codebook stay")
        if self.freeze_tokens and self.train.restart_codes_after:
            raise ValueError("train.restart_codes_after moves codes, which freeze_tokens keeps; set it to 0")
        if self.loss.consistency and not self.trains_discriminator:
            raise ValueError("loss.consistency is a term of the discriminator: it needs loss.adversarial")
        if self.train.restart_codes_after and model.quantizer.kind != "vq":
            raise ValueError(
                f"train.restart_codes_after moves codes of quantizer kind vq; this is {model.quantizer.kind}"
            )
        if self.eval is not None and model.image_size < SSIM_WINDOW:
            raise ValueError(
                f"eval: SSIM needs images of at least {SSIM_WINDOW} px; the model's are {model.image_size} px"
            )

    def _check_generator(self) -> None:
        if self.freeze_tokens:
            raise ValueError("freeze_tokens: a generator has no tokens")
        if self.train.restart_codes_after:
            raise ValueError("train.restart_codes_after moves codes; a generator has none")
        if self.eval is not None and not self.eval.compares_features:
            raise ValueError("eval: a generator needs eval.fid=true, or eval.features and eval.feature_weights")

    @property
    def trains_discriminator(self) -> bool:
        """Whether the loss has an adversarial term."""
        return self.loss.adversarial > 0 if isinstance(self.loss, LossConfig) else True

    def images_at_a_time(self, processes: int) -> int:
        """Images that pass through the networks of each process at a time; raises `ConfigError` if that cannot be."""
        batch = self.train.batch_size
        if batch % processes:
            raise ConfigError(f"train.batch_size {batch}: cannot be shared out evenly among {processes} processes")
        share = batch // processes
        micro = min(self.train.micro_batch_size or share, share)
        sizes = {micro, share % micro} - {0}
        if 1 in sizes and isinstance(self.model, VQHiTConfig) and self.model.normalises_one_token:
            raise ConfigError(
                "model.stem.latent_grid 1: batch norm needs more than one token; no (micro-)batch may be one image"
            )
        bad = [size for size in sorted(sizes, reverse=True) if size > STDDEV_GROUP and size % STDDEV_GROUP]
        if bad and self.discriminator is not None and self.discriminator.minibatch_stddev:
            raise ConfigError(
                f"discriminator.minibatch_stddev: (micro-)batches of {bad[0]} images; allowed: up to {STDDEV_GROUP}, "
                "or a multiple of it"
            )
        return micro

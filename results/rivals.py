"""Who is compared in `comparison.py`: float training, torchao's and SDNQ's int8 training, and ours.

Each is set up as its own documentation says, through its public functions only. A rival that is not installed is
left out, and the record says so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

import torch
from torch import Tensor, nn

import fqt
from fqt.bench.contestants import Contestant

Rounding = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True, kw_only=True)
class Rival:
    """A way to train.

    Attributes:
        key: in the record.
        title: on the page.
        package: what must be installed; empty for torch and fqt.
        version: that is compared.
        convert: a model's layers, in place. They are children of the model, which is how SDNQ looks for them.
        autocast: whether the forward pass runs under bfloat16 autocast.
        short: whether the model itself is bfloat16 in the measurement of speed.
        compiled: whether it is compiled there.
        parts: of the comparison that it takes part in; empty for all.
        stored: (matrix, seed) to what the library keeps of a weight in place of it, where it rounds what it keeps.
        mixes: as in `fqt.certify`.
    """

    key: str
    title: str
    package: str = ""
    version: str = ""
    convert: Callable[[nn.Module], nn.Module] = lambda model: model
    autocast: bool = False
    short: bool = False
    compiled: bool = False
    parts: tuple[str, ...] = ()
    stored: Rounding | None = None
    mixes: int | None = None

    @property
    def contestant(self) -> Contestant:
        """As `fqt.bench` runs it."""
        group = "ours" if self.key.startswith("fqt") else "torchao"
        return Contestant(
            name=self.key,
            group=group,
            convert=self.convert,
            autocast=self.autocast,
            compiled=self.compiled,
            short=self.short,
        )

    def absence(self) -> str:
        """Why it cannot take part, in one line; empty if it can."""
        if not self.package:
            return ""
        wanted = f"pip install {self.package}=={self.version}"
        try:
            found = metadata.version(self.package)
        except metadata.PackageNotFoundError:
            return f"{self.package} is not installed ({wanted})"
        return (
            "" if found == self.version else f"{self.package} {found} is installed, not {self.version} ({wanted})"
        )


def _torchao(swap: bool) -> Callable[[nn.Module], nn.Module]:
    def convert(model: nn.Module) -> nn.Module:
        from torchao.prototype.quantized_training import Int8MixedPrecisionTrainingConfig
        from torchao.quantization import quantize_

        quantize_(model, Int8MixedPrecisionTrainingConfig(module_swap=swap))
        return model

    return convert


def _torchao_stored(model: nn.Module) -> nn.Module:
    from torchao.prototype.quantized_training import int8_weight_only_quantized_training
    from torchao.quantization import quantize_

    quantize_(model, int8_weight_only_quantized_training())
    return model


def _torchao_weight(x: Tensor, seed: int) -> Tensor:
    """What an optimizer's step leaves: an assignment to the stored weight."""
    from torchao.prototype.quantized_training import Int8QuantizedTrainingLinearWeight

    torch.manual_seed(seed)
    weight = Int8QuantizedTrainingLinearWeight.from_float(torch.zeros_like(x))
    weight.copy_(x)
    return weight.dequantize()


def _sdnq(model: nn.Module) -> nn.Module:
    """Products in int8, weights left as they are; the kept input is int8, too."""
    from sdnq.training import sdnq_training_post_load_quant

    return sdnq_training_post_load_quant(
        model,
        weights_dtype="int8",
        use_quantized_matmul=True,
        use_static_quantization=False,
        use_grad_ckpt=False,
        add_skip_keys=False,
    )


def _sdnq_stored(model: nn.Module) -> nn.Module:
    """The example of its documentation, with int8 products."""
    from sdnq.training import sdnq_training_post_load_quant

    return sdnq_training_post_load_quant(
        model, weights_dtype="uint8", use_quantized_matmul=True, use_grad_ckpt=False, add_skip_keys=False
    )


def _sdnq_weight(x: Tensor, seed: int) -> Tensor:
    from sdnq.training import SDNQTensor

    torch.manual_seed(seed)
    weight = SDNQTensor.from_float(x, weights_dtype="uint8", group_size=32, use_stochastic_rounding=True)
    return weight.dequantize()


def _ours(recipe: str, keep: int | None = None) -> Callable[[nn.Module], nn.Module]:
    def convert(model: nn.Module) -> nn.Module:
        fqt.quantize_(model, recipe)
        return model if keep is None else fqt.compress_(model, bits=keep)

    return convert


_AO = {"package": "torchao", "version": "0.18.0"}
_SD = {"package": "sdnq", "version": "0.2.8"}
_COST = ("accuracy", "kept", "speed")
_SLOW = ("tried", "rounding", "accuracy", "kept")  # their weights are for their own optimizers, to save memory
RIVALS = (
    Rival(key="fp32", title="fp32", parts=("rounding", *_COST)),
    Rival(key="bf16", title="bf16 autocast", autocast=True, parts=("rounding", *_COST)),
    Rival(key="torchao", title="torchao int8, `module_swap=True`", convert=_torchao(True), **_AO),
    Rival(
        key="torchao compiled",
        title="the same, bf16 model, compiled",
        convert=_torchao(True),
        **_AO,
        short=True,
        compiled=True,
        parts=("speed",),
    ),
    Rival(
        key="torchao default", title="torchao int8, as by default", convert=_torchao(False), **_AO, parts=("tried",)
    ),
    Rival(
        key="torchao stored",
        title="torchao, weights kept in int8",
        convert=_torchao_stored,
        **_AO,
        stored=_torchao_weight,
        parts=_SLOW,
    ),
    Rival(key="sdnq", title="SDNQ int8", convert=_sdnq, **_SD),
    Rival(
        key="sdnq stored",
        title="SDNQ, weights kept in uint8",
        convert=_sdnq_stored,
        **_SD,
        stored=_sdnq_weight,
        parts=_SLOW,
    ),
    Rival(key="fqt", title="fqt, `default`", convert=_ours("default")),
    Rival(
        key="fqt bf16", title="the same, bf16 autocast", convert=_ours("default"), autocast=True, parts=("speed",)
    ),
    Rival(key="fqt compressed", title="the same, `compress_` to 8 bits", convert=_ours("default", 8), parts=_COST),
    Rival(
        key="fqt shq4d",
        title="fqt, `shq4d`: 4-bit gradients",
        convert=_ours("shq4d"),
        mixes=0,
        parts=("rounding", *_COST),
    ),
)


def taking_part(part: str) -> list[Rival]:
    """Those compared in a part."""
    return [rival for rival in RIVALS if not rival.parts or part in rival.parts]


def setting(rival: Rival) -> contextlib.AbstractContextManager:
    """What its forward pass runs in."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=rival.autocast)

"""Which mixers stand against each other, and why one of them is absent."""

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from functools import cache, partial

import torch

from .mixers import GRU, TTT, Attention, FlaTTT, GatedDeltaNet, Mamba, Mamba2, Mixer, PlainMamba


def side_makers() -> dict[str, Callable[[int], Mixer]]:
    """Every contestant's maker, from the width, by its label."""
    own = {
        f"TTT-{title} ({backbone.title()})": partial(TTT, inner=inner, backbone=backbone)
        for inner, title in (("linear", "Linear"), ("mlp", "MLP"))
        for backbone in ("transformer", "mamba")
    }
    return own | {
        "attention": Attention,
        "attention without rotation": partial(Attention, rotated=False),
        "GRU": GRU,
        "Mamba, plain PyTorch of transformers": PlainMamba,
        "Mamba, CUDA scan of mamba-ssm": Mamba,
        "Mamba-2, Triton kernels of mamba-ssm": Mamba2,
        "gated delta rule of flash-linear-attention": GatedDeltaNet,
        "TTT-Linear of flash-linear-attention (another layer, speed only)": FlaTTT,
    }


@cache
def absences(device: str) -> dict[str, str]:
    """Why contestants do not take part on a device, ``"cpu"`` or ``"cuda"``, by label."""
    reasons = {label: _why_absent(maker, device) for label, maker in side_makers().items()}
    return {label: reason for label, reason in reasons.items() if reason}


def present(device: str) -> dict[str, Callable[[int], Mixer]]:
    """The makers of those that take part on a device."""
    return {label: maker for label, maker in side_makers().items() if label not in absences(device)}


def _why_absent(maker: object, device: str) -> str:
    if maker is PlainMamba:
        return "compared on a CPU only" if device == "cuda" else import_failure("transformers.models.mamba")
    needs = {Mamba: "mamba_ssm", Mamba2: "mamba_ssm", GatedDeltaNet: "fla.layers", FlaTTT: "fla.ops.ttt"}
    if maker not in needs:
        return ""
    if device != "cuda":
        return "its kernels need a GPU"
    if maker in (Mamba, Mamba2) and not has_cuda_scan() and maker is Mamba:
        return "its compiled CUDA scan is not installed"
    return import_failure(needs[maker])


def has_cuda_scan() -> bool:
    """Whether Mamba's compiled scan is there; ``mamba_ssm`` asks for it, so an empty module else takes its place."""
    try:
        scan = importlib.import_module("selective_scan_cuda")
    except ImportError:
        scan = sys.modules["selective_scan_cuda"] = types.ModuleType("selective_scan_cuda")
    return hasattr(scan, "fwd")


def import_failure(module: str) -> str:
    """Why a module cannot be imported; empty if it can."""
    package = module.split(".")[0]
    if importlib.util.find_spec(package) is None:
        return f"the package {package} is not installed"
    try:
        importlib.import_module(module)
    except Exception as error:  # a competitor's own trouble, of whatever kind, is reported, not ours to raise
        return f"{module} cannot be imported: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return ""


def default_device() -> str:
    """``"cuda"`` where there is a GPU, else ``"cpu"``."""
    return "cuda" if torch.cuda.is_available() else "cpu"

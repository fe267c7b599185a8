"""Files as lycoris-lora 4.1.3 writes them, and what each of their layers means.

The outside judge of everything that reads or writes LyCORIS and kohya factors: its own modules on
the layers of any model, with factors that are random and nowhere zero, what its own network saves
of them, and each layer's weight twice: as LyCORIS computes it, and from the file's tensors by the
formula, dense, in float64.

    file = write(unet, "lokr decompose_both", prefix="lora_unet", only=in_blocks)
    save_file(file.tensors, path)
    with file.applied():
        wanted = unet(...)
"""

import math
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.wrapper import network_module_dict
from torch import Tensor, nn

from hf_lora.formats.kinds import Loose
from hf_lora.formats.names import Names

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

# Name -> (algorithm, options of its modules), what LyCORIS can make of each kind that peft holds.
VARIANTS: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "lora": ("lora", {}),
    "lora use_scalar": ("lora", {"use_scalar": True}),
    "lora rs_lora": ("lora", {"rs_lora": True}),
    "lora tucker": ("lora", {"use_tucker": True}),
    "lora tucker use_scalar": ("lora", {"use_tucker": True, "use_scalar": True}),
    "dora": ("lora", {"weight_decompose": True}),
    "dora tucker rs_lora": (
        "lora",
        {"weight_decompose": True, "use_tucker": True, "rs_lora": True},
    ),
    "dylora": ("dylora", {"block_size": 2}),
    "loha": ("loha", {}),
    "loha use_scalar": ("loha", {"use_scalar": True}),
    "loha rs_lora": ("loha", {"rs_lora": True}),
    "loha tucker": ("loha", {"use_tucker": True}),
    "lokr": ("lokr", {}),
    "lokr factor 4": ("lokr", {"factor": 4}),
    "lokr factor 8": ("lokr", {"factor": 8}),
    "lokr tucker": ("lokr", {"use_tucker": True}),
    "lokr use_scalar": ("lokr", {"use_scalar": True}),
    "lokr rs_lora": ("lokr", {"rs_lora": True}),
    "lokr full_matrix": ("lokr", {"full_matrix": True}),
    "lokr decompose_both": ("lokr", {"decompose_both": True}),
    "lokr decompose_both tucker": ("lokr", {"decompose_both": True, "use_tucker": True}),
}
# What LyCORIS can write as well, and no adapter of peft holds: name -> (algorithm, options).
NOT_HELD: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "dora on input": ("lora", {"weight_decompose": True, "wd_on_out": False}),
    "doha": ("loha", {"weight_decompose": True}),
    "dokr": ("lokr", {"weight_decompose": True}),
    "lokr unbalanced": ("lokr", {"unbalanced_factorization": True, "factor": 4}),
    "glora": ("glora", {}),
    "full": ("full", {}),
    "diag-oft": ("diag-oft", {"rescaled": True}),
    "boft": ("boft", {}),
    "ia3": ("ia3", {}),
    "tlora": ("tlora", {}),
}

CANONICAL = {
    "lora_up.weight": "lora_B",
    "lora_down.weight": "lora_A",
    "lora_mid.weight": "lora_mid",
}


@dataclass(frozen=True)
class Written:
    """A file of LyCORIS, and what it means.

    Attributes:
        tensors: What its network would save: `<prefix>_<name with underscores>.<factor>`.
        modules: Path on the model -> LyCORIS's own module.
        names: Path -> how the file calls it.
    """

    tensors: Mapping[str, Tensor]
    modules: Mapping[str, nn.Module]
    names: Mapping[str, str]

    def loose(self) -> dict[str, Loose]:
        """The layers by the model's paths, factors in canonical names."""
        return {path: self._loose(name) for path, name in self.names.items()}

    def _loose(self, name):
        keys = tuple(sorted(key for key in self.tensors if key.startswith(f"{name}.")))
        ends = [key.removeprefix(f"{name}.") for key in keys]
        return Loose({CANONICAL.get(e, e): self.tensors[f"{name}.{e}"] for e in ends}, keys)

    @contextmanager
    def applied(self):
        """The model computes with LyCORIS's own modules inside."""
        for module in self.modules.values():
            module.apply_to()
        try:
            yield
        finally:
            for module in self.modules.values():
                module.restore()

    @torch.no_grad()
    def weight(self, path: str) -> Tensor:
        """The merged weight as LyCORIS's forward computes it.

        Not `get_merged_weight`: of LoHa and LoKr that multiplies by the scale twice (4.1.3).
        """
        module = self.modules[path]
        base = module.org_weight.detach()
        if isinstance(module, LoConModule):
            return module.get_merged_weight()[0]
        return base + module.get_weight(module.shape) * module.scalar

    def dense(self, path: str) -> Tensor:
        """The merged weight by formula from the file's tensors, in float64."""
        return dense(self._loose(self.names[path]).factors, self.modules[path].org_weight.detach())


def write(
    model: nn.Module,
    variant: str,
    *,
    prefix: str = "lycoris",
    call: Callable[[str], str] = lambda path: path,
    only: Callable[[str, nn.Module], bool] = lambda path, layer: True,
    rank: int = 4,
    alpha: float = 3,
    conv_rank: int = 2,
    conv_alpha: float = 5,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Written:
    """Makes LyCORIS's modules on a model's layers, which stays as it is, and what they save.

    Args:
        model: Any model.
        variant: A name in `VARIANTS` or `NOT_HELD`.
        prefix: What the keys begin with: `lycoris` of its own network, `lora_unet` of kohya's.
        call: Path -> what the file calls the module, with dots; in other words than the model's
            where it is in those of an original repository.
        only: (path, layer) -> whether the layer gets a module, of linears and convolutions.
        rank: Of linears and convolutions with a kernel of 1, as LyCORIS has it.
        alpha: Of the same.
        conv_rank: Of larger kernels.
        conv_alpha: Of the same.
        dtype: Of the file. Weights are judged as if the modules had been of this dtype.
        seed: Of the factors.
    """
    algorithm, options = {**VARIANTS, **NOT_HELD}[variant]
    kind = network_module_dict[algorithm]
    generator = torch.Generator().manual_seed(seed)
    tensors, modules, names = {}, {}, {}
    for path, layer in model.named_modules():
        if not isinstance(layer, LAYERS) or not only(path, layer):
            continue
        small = all(side == 1 for side in getattr(layer, "kernel_size", ()))
        own_rank, own_alpha = (rank, alpha) if small else (conv_rank, conv_alpha)
        name = f"{prefix}_{call(path)}".replace(".", "_")
        module = kind(name, layer, 1.0, own_rank, own_alpha, **options)
        _randomise(module, generator, dtype)
        if kind is LokrModule and module.use_w1 and module.use_w2:
            # as its own reader has it: the sqrt(rank) that rs_lora trains with is not in the file
            module.scale = 1.0
        held = {key: tensor.detach().clone() for key, tensor in module.state_dict().items()}
        tensors |= {f"{name}.{key}": tensor.to(dtype) for key, tensor in held.items()}
        modules[path], names[path] = module, name
    return Written(tensors, modules, names)


@torch.no_grad()
def _randomise(module, generator, dtype):
    """Gives every parameter values that change outputs by about as much as there is."""
    size = 0.3 if isinstance(module, LohaModule | LokrModule) else 0.15
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name == "dora_scale":
            value = parameter * (1 + 0.2 * noise.clamp(-2, 2))
        elif name == "scalar":
            value = noise.abs() + 0.5
        else:
            value = noise * size
        parameter.copy_(value.to(dtype))


def names_of(model: nn.Module) -> Names:
    """What codecs know of a model."""
    layers = {p: m for p, m in model.named_modules() if isinstance(m, LAYERS)}
    shapes = {path: tuple(layer.weight.shape) for path, layer in layers.items()}
    return Names(type(model).__name__, shapes)


def dense(factors: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    """The weight that a layer's factors make of the base's, in float64 by the papers' formulas."""
    held = {name: tensor.double() for name, tensor in factors.items()}
    base = weight.double()
    merged = base + update(held, tuple(base.shape))
    if "dora_scale" in held:
        norm = merged.flatten(1).norm(dim=1).reshape(-1, *(1 for _ in base.shape[1:]))
        merged = merged * held["dora_scale"] / norm
    return merged


def update(held: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    """The scaled update of a layer of this shape; factors by canonical name, in float64."""
    for mark, formula in (("lora_A", _lora), ("hada_w1_a", _loha)):
        if mark in held:
            delta, rank = formula(held)
            return delta.reshape(shape) * _scaling(held, rank)
    delta, rank = _lokr(held, shape)
    return delta.reshape(shape) * (_scaling(held, rank) if rank else 1.0)


def _scaling(held, rank):
    return float(held["alpha"]) / rank if "alpha" in held else 1.0


def _lora(held):
    up, down = held["lora_B"].flatten(1), held["lora_A"]
    if "lora_mid" in held:
        return torch.einsum("mn...,om,ni->oi...", held["lora_mid"], up, down.flatten(1)), len(down)
    return up @ down.flatten(1), len(down)


def _loha(held):
    products = []
    for n in (1, 2):
        a, b = held[f"hada_w{n}_a"], held[f"hada_w{n}_b"]
        core = held.get(f"hada_t{n}")
        products.append(a @ b if core is None else torch.einsum("ij...,io,jc->oc...", core, a, b))
    return products[0] * products[1], len(held["hada_w1_b"])


def _lokr(held, shape):
    first = held["lokr_w1"] if "lokr_w1" in held else held["lokr_w1_a"] @ held["lokr_w1_b"]
    if "lokr_w2" in held:
        second = held["lokr_w2"].flatten(1)
    elif "lokr_t2" in held:
        a, b, core = (held[f"lokr_{x}"] for x in ("w2_a", "w2_b", "t2"))
        second = torch.einsum("ij...,io,jc->oc...", core, a, b).flatten(1)
    else:
        second = held["lokr_w2_a"] @ held["lokr_w2_b"]
    kernel = math.prod(shape[2:])
    # the kernel belongs to the second factor, so it lies innermost in the product
    assert first.shape[1] * second.shape[1] == shape[1] * kernel
    low = [held[name] for name in ("lokr_w1_b", "lokr_w2_b") if name in held]
    return torch.kron(first, second.contiguous()), len(low[0]) if low else 0

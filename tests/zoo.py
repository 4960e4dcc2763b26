"""Awkward models: small, each with one habit that trips tools up, its data and its loss.

Who writes a public function runs it over this zoo; who meets a new awkward model adds it here. ``tests/test_untouched.py``
applies one check to all of them.
"""

from __future__ import annotations

import random
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from skipscope import reference

N, WIDTH, CLASSES = 6, 8, 3


@dataclass(frozen=True)
class Animal:
    """A model, its data and its loss.

    Attributes:
        name: of the habit.
        make: builds the model; the seed is set before.
        data: builds one batch.
        loss: of the output and the target, or None when the output carries its own.
        slow: takes seconds, or needs a compiler.
    """

    name: str
    make: Callable[[], nn.Module]
    data: Callable[[], Any]
    loss: Any
    slow: bool = False


ZOO: dict[str, Animal] = {}


def _rows(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, WIDTH, generator=generator).to(dtype), torch.randint(
        CLASSES, (N,), generator=generator
    )


def _images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, 4, 6, 6, generator=generator), torch.randint(CLASSES, (N,), generator=generator)


def _sequences() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, 5, WIDTH, generator=generator), torch.randint(CLASSES, (N,), generator=generator)


def _tokens() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(11, (N, 5), generator=generator), torch.randint(CLASSES, (N,), generator=generator)


def animal(
    data: Callable[[], Any] = _rows,
    loss: Any = F.cross_entropy,
    *,
    slow: bool = False,
    name: str | None = None,
):
    """Add a model to the zoo: a class, or a function that returns one, named after its habit."""

    def add(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        key = name or make.__name__.lstrip("_")
        assert key not in ZOO, key
        ZOO[key] = Animal(key, make, data, loss, slow)
        return make

    return add


class Net(nn.Module):
    """What most animals derive from: three residual blocks of ``f`` and a head."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3)])
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


# --- shapes of networks ---


@animal()
def residual():
    return Net()


@animal()
def no_shortcuts():
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, CLASSES))


@animal()
def one_layer():
    return nn.Linear(WIDTH, CLASSES)


@animal(lambda: reference.digits(4))
def resnet20_in_training_mode():
    return reference.resnet20().train()


@animal(lambda: reference.digits(4))
def resnet20_in_evaluation_mode():
    return reference.resnet20().eval()


@animal(lambda: reference.english(2, context=8))
def gpt_with_tied_head():
    return reference.gpt(2, 16, 2)


@animal(_sequences)
class transformer_encoder_in_evaluation_mode(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.eval()

    def forward(self, x):
        return self.head(self.encoder(x).mean(1))


@animal(_sequences)
def transformer_encoder_in_training_mode():
    return transformer_encoder_in_evaluation_mode().train()


@animal(_sequences)
class lstm(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(WIDTH, WIDTH, num_layers=2, batch_first=True)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        y, _ = self.rnn(x)
        return self.head((x + y)[:, -1])


@animal(_sequences)
class gru_cell_in_a_loop(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.GRUCell(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        h = torch.zeros_like(x[:, 0])
        for t in range(x.shape[1]):
            h = h + self.cell(x[:, t], h)
        return self.head(h)


@animal()
class in_place_residual(Net):
    def forward(self, x):
        for block in self.blocks:
            out = block[0](x)
            out += x
            x = F.relu_(out)
        return self.head(x)


@animal()
class concatenating(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, 4), nn.Linear(WIDTH + 4, 4)
        self.head = nn.Linear(WIDTH + 8, CLASSES)

    def forward(self, x):
        x = torch.cat([x, self.a(x).relu()], 1)
        return self.head(torch.cat([x, self.b(x).relu()], 1))


@animal()
class no_parameters_before_the_first_merge(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        return self.head(x + x.tanh())


@animal()
class length_of_the_loop_depends_on_the_data(Net):
    def forward(self, x):
        for _ in range(1 + int(x.abs().sum()) % 3):
            x = x + self.blocks[0](x)
        return self.head(x)


@animal()
class mixture_of_experts(Net):
    def forward(self, x):
        out = torch.zeros_like(x)
        for i, block in enumerate(self.blocks):
            chosen = (x[:, 0] * 7).long().remainder(3) == i
            if chosen.any():
                out[chosen] = block(x[chosen])
        return self.head(x + out)


# --- sharing and freezing ---


@animal()
class one_block_called_three_times(Net):
    def forward(self, x):
        for _ in range(3):
            x = x + self.blocks[0](x)
        return self.head(x)


@animal()
def one_module_under_two_names():
    model = Net()
    model.blocks[2] = model.blocks[0]
    return model


@animal()
def tied_weights():
    model = Net()
    model.blocks[1][0].weight = model.blocks[0][0].weight
    return model


@animal()
def half_frozen():
    model = Net()
    model.blocks[:2].requires_grad_(False)
    return model


@animal()
def weight_frozen_bias_free():
    model = Net()
    for block in model.blocks:
        block[0].weight.requires_grad_(False)
    return model


@animal()
def all_frozen_but_the_head():
    model = Net().requires_grad_(False)
    model.head.requires_grad_(True)
    return model


@animal()
def unused_parameters():
    model = Net()
    model.register_module("unused", nn.Linear(3, 3))
    model.register_parameter("also_unused", nn.Parameter(torch.ones(2)))
    return model


@animal()
def gradients_already_there():
    model = Net()
    F.cross_entropy(model(_rows()[0]), _rows()[1]).backward()
    model.head.bias.grad = None
    model.head.weight.grad.requires_grad_()
    return model


@animal()
def norms_frozen_inside_a_training_model():
    model = nn.Sequential(
        nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES)
    ).train()
    model[1].eval()
    return model


# --- what changes in a forward pass ---


@animal()
def batch_norm_in_training_mode():
    return nn.Sequential(
        nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES)
    ).train()


@animal()
def batch_norm_with_cumulative_average():
    return nn.Sequential(
        nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH, momentum=None), nn.Linear(WIDTH, CLASSES)
    ).train()


@animal()
def dropout():
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5), nn.Linear(WIDTH, CLASSES)).train()


@animal()
class counts_its_calls_in_a_buffer(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.full((WIDTH,), float("nan")), persistent=False)

    def forward(self, x):
        self.calls += 1
        self.mean = x.detach().mean(0)  # the buffer is replaced, not written to
        return super().forward(x)


@animal()
class counts_its_calls_in_an_attribute(Net):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


@animal()
class keeps_its_activations(Net):
    def forward(self, x):
        self.last_input = x
        x = super().forward(x)
        self.last_output = x
        return x


@animal()
class caches_in_a_list(Net):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(x.detach().mean().item())
        return super().forward(x)


@animal()
class caches_in_nested_containers(Net):
    def __init__(self):
        super().__init__()
        self.cache = {"means": [], "sizes": {"rows": 0}}
        self.recent = deque(maxlen=2)
        self.shapes = set()

    def forward(self, x):
        self.cache["means"].append(float(x.detach().mean()))
        self.cache["sizes"]["rows"] += len(x)
        self.recent.append(len(x) + len(self.cache["means"]))
        self.shapes.add(tuple(x.shape))
        return super().forward(x)


@animal()
class keeps_a_running_mean_in_a_dict(Net):
    def __init__(self):
        super().__init__()
        self.statistics = {"mean": torch.zeros(WIDTH)}

    def forward(self, x):
        self.statistics["mean"].mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return super().forward(x)


@animal()
class keeps_a_running_mean_in_an_object(Net):
    class Statistics:
        def __init__(self):
            self.mean, self.count = torch.zeros(WIDTH), 0

    def __init__(self):
        super().__init__()
        self.statistics = self.Statistics()

    def forward(self, x):
        self.statistics.mean += x.detach().mean(0)
        self.statistics.count += 1
        return super().forward(x)


@animal()
class writes_to_a_plain_tensor(Net):
    def __init__(self):
        super().__init__()
        self.mean = torch.zeros(WIDTH)
        self.numbers = np.zeros(WIDTH)

    def forward(self, x):
        self.mean.add_(x.detach().mean(0))
        self.numbers += x.detach().mean(0).numpy()
        return super().forward(x)


@animal()
class draws_from_every_global_generator(Net):
    def forward(self, x):
        return super().forward(x * (1 + 0.01 * (torch.rand(()) + np.random.rand() + random.random())))


@animal()
class draws_from_generators_of_its_own(Net):
    def __init__(self):
        super().__init__()
        self.torch_generator = torch.Generator().manual_seed(3)
        self.numpy_generator = np.random.default_rng(3)
        self.python_generator = random.Random(3)

    def forward(self, x):
        noise = torch.rand((), generator=self.torch_generator)
        noise = noise + self.numpy_generator.random() + self.python_generator.random()
        return super().forward(x * (1 + 0.01 * noise))


@animal()
class changes_the_mode_of_a_child(Net):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x):
        self.norm.eval()
        return super().forward(self.norm(x))


@animal()
class freezes_in_its_forward(Net):
    def forward(self, x):
        self.blocks[0][0].bias.requires_grad_(False)
        return super().forward(x)


@animal()
class registers_a_hook_in_its_forward(Net):
    def forward(self, x):
        self.head.register_forward_hook(lambda module, args, output: None)
        return super().forward(x)


@animal()
class adds_a_module_in_its_forward(Net):
    def forward(self, x):
        if not hasattr(self, "late"):
            self.late = nn.Identity()
        return super().forward(self.late(x))


@animal()
class leaves_its_gradient_context(Net):
    def forward(self, x):
        with torch.no_grad():
            x = x + self.blocks[0](x)
        with torch.enable_grad():
            return self.head(x + self.blocks[1](x))


# --- hooks ---


@animal()
def forward_hooks_of_every_kind():
    model, seen = Net(), []
    model.register_forward_pre_hook(lambda module, args: seen.append("pre"))
    model.register_forward_pre_hook(lambda module, args, kwargs: None, with_kwargs=True, prepend=True)
    model.blocks[0].register_forward_hook(lambda module, args, output: output * 1.0)
    model.blocks[1].register_forward_hook(lambda module, args, output: None, always_call=True)
    model.head.register_forward_hook(lambda module, args, kwargs, output: None, with_kwargs=True)
    return model


@animal()
def backward_hooks_of_every_kind():
    model = Net()
    model.blocks[0].register_full_backward_hook(lambda module, grad_in, grad_out: None)
    model.blocks[1].register_full_backward_pre_hook(lambda module, grad_out: None)
    model.head.weight.register_hook(lambda gradient: gradient * 1.0)
    model.head.bias.register_post_accumulate_grad_hook(lambda parameter: None)
    return model


@animal()
def state_dict_hooks():
    model = Net()
    model._register_state_dict_hook(lambda module, state, prefix, local: None)
    model.register_load_state_dict_post_hook(lambda module, keys: None)
    return model


# --- parametrizations and other machinery ---


@animal()
def weight_norm():
    model = Net()
    for block in model.blocks:
        nn.utils.parametrizations.weight_norm(block[0])
    return model


@animal()
def weight_norm_by_hooks():
    model = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(model.blocks[0][0])
    return model


@animal()
def spectral_norm():
    model = Net().train()  # each forward pass in training mode moves its power iteration on
    nn.utils.parametrizations.spectral_norm(model.blocks[0][0])
    return model


@animal()
def pruned():
    from torch.nn.utils import prune

    model = Net()
    prune.l1_unstructured(model.blocks[0][0], "weight", amount=0.3)
    return model


@animal()
class checkpointed(Net):
    reentrant = False

    def forward(self, x):
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


@animal()
class checkpointed_reentrant(checkpointed):
    reentrant = True


@animal()
class custom_autograd_function(Net):
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            return gradient * 2

    def forward(self, x):
        for block in self.blocks:
            x = x + self.Doubled.apply(block(x))
        return self.head(x)


@animal(slow=True)
def compiled():
    return torch.compile(Net(), backend="aot_eager")


@animal()
def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, CLASSES)))


@animal()
def quantised():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(no_shortcuts(), {nn.Linear}, torch.qint8)


@animal()
def lazy():
    return nn.Sequential(nn.LazyLinear(WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES))


@animal()
def on_the_meta_device():
    return Net().to("meta")


@animal()
class overrides_train(Net):
    def train(self, mode=True):
        super().train(mode)
        self.head.train(False)
        self.times_switched = getattr(self, "times_switched", 0) + 1
        return self


class _Merging(nn.Linear):
    """A low-rank update that is added to the weight in evaluation mode, in place, and taken out again in training mode."""

    def __init__(self):
        super().__init__(WIDTH, WIDTH)
        self.down, self.up = nn.Parameter(torch.randn(2, WIDTH) / 3), nn.Parameter(torch.randn(WIDTH, 2) / 3)
        self.merged = False

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * (self.up.data @ self.down.data)
            self.merged = not mode
        return self

    def forward(self, x):
        return super().forward(x) + (0 if self.merged else x @ self.down.T @ self.up.T)


@animal()
class merges_weights_in_evaluation_mode(Net):
    def __init__(self):
        super().__init__()
        self.blocks[1] = nn.Sequential(_Merging(), nn.Tanh())


@animal()
class swaps_in_averaged_weights_in_evaluation_mode(Net):
    def __init__(self):
        super().__init__()
        self.other = {name: p.detach() + 0.1 for name, p in self.named_parameters()}

    def train(self, mode=True):
        if mode != self.training:
            for name, p in self.named_parameters():
                p.data, self.other[name] = self.other[name], p.data
        return super().train(mode)


@animal()
class fuses_layers_in_evaluation_mode(Net):
    def __init__(self):
        super().__init__()
        self.norm, self.stem, self.fused = nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH), None

    def eval(self):
        if self.fused is None:
            self.fused = nn.utils.fuse_linear_bn_eval(self.stem.eval(), self.norm.eval())
            del self.stem, self.norm
        return super().eval()

    def forward(self, x):
        return super().forward(self.fused(x) if self.fused is not None else self.norm(self.stem(x)))


@animal()
class replaces_its_weights_data_in_its_forward(Net):
    def __init__(self):
        super().__init__()
        self.target = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        self.target.weight.data = 0.9 * self.target.weight.data + 0.1 * self.head.weight.data
        return super().forward(x) + self.target(x).detach()


@animal()
class overrides_setattr(Net):
    def __setattr__(self, name, value):
        if name == "training":
            self.__dict__["switches"] = self.__dict__.get("switches", 0) + 1
        super().__setattr__(name, value)


@animal()
class overrides_getattr(Net):
    def __getattr__(self, name):
        if name == "classes":
            return CLASSES
        return super().__getattr__(name)


@animal()
class modules_in_a_plain_list(Net):
    def __init__(self):
        super().__init__()
        self.hidden = [nn.BatchNorm1d(WIDTH)]

    def forward(self, x):
        return super().forward(self.hidden[0](x))


@animal()
class raises_on_its_second_call(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        if self.calls == 2:
            raise RuntimeError("the second call")
        return super().forward(x)


# --- precisions ---


@animal(lambda: _rows(torch.float64))
def double():
    return Net().double()


@animal(lambda: _rows(torch.bfloat16))
def bfloat16():
    return Net().bfloat16()


@animal(lambda: _rows(torch.float16))
def float16():
    return Net().half()


@animal(lambda: (_rows()[0].to(torch.complex64), _rows()[1]))
class complex_weights(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH, dtype=torch.complex64)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, z):
        return self.head((z + self.a(z)).abs())


@animal()
def channels_of_two_precisions():
    model = Net()
    model.blocks[1] = nn.Sequential(
        _Cast(torch.float64), nn.Linear(WIDTH, WIDTH).double(), _Cast(torch.float32)
    )
    return model


class _Cast(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, x):
        return x.to(self.dtype)


# --- inputs and outputs ---


@animal(lambda: ((_rows()[0], _rows()[0] * 2), _rows()[1]))
class two_inputs(Net):
    def forward(self, x, y):
        return super().forward(x + y)


@animal(lambda: {"x": _rows()[0], "labels": _rows()[1]}, None)
class keywords_in_and_its_own_loss_out(Net):
    def forward(self, x, labels=None):
        logits = super().forward(x)
        return {"logits": logits, "loss": F.cross_entropy(logits, labels)}


@dataclass
class Output:
    """What some models return."""

    logits: Tensor
    hidden: tuple[Tensor, ...]


@animal(loss=lambda output, target: F.cross_entropy(output.logits, target))
class dataclass_out(Net):
    def forward(self, x):
        hidden = []
        for block in self.blocks:
            x = x + block(x)
            hidden.append(x)
        return Output(self.head(x), tuple(hidden))


@animal(loss=lambda output, target: F.cross_entropy(output[0], target) + 0.1 * output[1])
class tuple_out(Net):
    def forward(self, x):
        return super().forward(x), x.square().mean() * self.head.weight.sum()


@animal(_tokens)
class integers_in(Net):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, WIDTH, padding_idx=0)

    def forward(self, ids):
        return super().forward(self.embedding(ids).mean(1))


@animal(_tokens)
class rescales_its_embeddings_in_its_forward(integers_in):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, WIDTH, max_norm=0.5)


@animal(_tokens)
class sparse_gradients(integers_in):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, WIDTH, sparse=True)


@animal(loss=lambda output, target: output.square().sum())
def loss_is_a_sum():
    return Net()


@animal(_images)
def convolutions_with_group_norm():
    return nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU(), nn.Flatten(), nn.Linear(144, CLASSES)
    )

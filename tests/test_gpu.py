"""On an accelerator: the same answers as on the CPU, on the device where the model is, and nothing moved.

Run with: python -m pytest -m gpu tests/test_gpu.py
"""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import skipscope as ss
from skipscope import reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")]

MODELS = {
    "mlp": lambda: (reference.deep_mlp(6, shortcut="identity"), reference.digits(64)),
    "resnet20": lambda: (reference.resnet20(), reference.digits(32, image=True)),
    "gpt": lambda: (reference.gpt(layers=2), reference.english(8)),
}


@pytest.fixture(params=MODELS)
def both(request):
    """The same model and batch on the CPU and on the device, in float64."""
    torch.manual_seed(0)
    model, (x, y) = MODELS[request.param]()
    model = model.double().eval()
    x = x.double() if x.is_floating_point() else x
    return (model, (x, y)), (copy.deepcopy(model).cuda(), (x.cuda(), y.cuda()))


def test_find_ablate_and_names(both):
    (cpu, (x, _)), (gpu, (x_gpu, _)) = both
    here, there = ss.find_shortcuts(cpu, x), ss.find_shortcuts(gpu, x_gpu)
    assert [(s.name, s.kind, s.branch) for s in here] == [(s.name, s.kind, s.branch) for s in there]
    for how in ("remove", "detach", "lesion"):
        twin = ss.ablate(gpu, there, how=how)
        torch.testing.assert_close(ss.ablate(cpu, here, how=how)(x), twin(x_gpu).cpu(), rtol=1e-9, atol=1e-11)
    assert next(twin.parameters()).is_cuda


def test_flow_split_and_paths(both):
    (cpu, data), (gpu, data_gpu) = both
    here, there = (ss.gradient_flow(m, d, F.cross_entropy) for m, d in ((cpu, data), (gpu, data_gpu)))
    np.testing.assert_allclose(
        [b.gradient_rms for b in here.boundaries], [b.gradient_rms for b in there.boundaries], rtol=1e-8
    )
    assert here.verdict.state == there.verdict.state
    here, there = (ss.path_spectrum(m, d, F.cross_entropy) for m, d in ((cpu, data), (gpu, data_gpu)))
    np.testing.assert_allclose(here.norms, there.norms, rtol=1e-7, atol=1e-12)
    here, there = (ss.gradient_split(m, d, F.cross_entropy) for m, d in ((cpu, data), (gpu, data_gpu)))
    np.testing.assert_allclose([s.shortcut_rms for s in here], [s.shortcut_rms for s in there], rtol=1e-7)


def test_landscape_and_curvature(both):
    (cpu, data), (gpu, data_gpu) = both
    here, there = (ss.landscape(m, d, F.cross_entropy, grid=5) for m, d in ((cpu, data), (gpu, data_gpu)))
    np.testing.assert_allclose(here.values, there.values, rtol=1e-6)
    here, there = (
        ss.extreme_eigenvalues(m, d, F.cross_entropy, tol=1e-2) for m, d in ((cpu, data), (gpu, data_gpu))
    )
    np.testing.assert_allclose(here.largest, there.largest, rtol=2e-2)


def test_training_and_the_main_job():
    make = MODELS["mlp"]
    data = tuple(t.cuda() for t in reference.digits(128))
    result = ss.compare(lambda: make()[0].cuda(), data, F.cross_entropy, grid=5, steps=60, seeds=2)
    assert result.training.curves["with"]["Adam"].losses[:, -1].mean() < 1.5
    assert not result.notes or not any("could not" in note for note in result.notes)


def test_the_model_and_the_devices_random_state_are_left_alone(both):
    _, (gpu, data) = both
    state, weights = torch.cuda.get_rng_state(), {k: v.clone() for k, v in gpu.state_dict().items()}
    ss.gradient_flow(gpu, data, F.cross_entropy)
    ss.importance(gpu, data, F.cross_entropy)
    ss.landscape(gpu, data, F.cross_entropy, grid=3)
    assert torch.equal(state, torch.cuda.get_rng_state())
    assert all(torch.equal(v, weights[k]) for k, v in gpu.state_dict().items())

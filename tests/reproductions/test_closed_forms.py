"""What the reproductions measure, against closed forms and theory."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import skipscope as ss
from reproductions import (
    _mean_field as theory,
)
from reproductions import (
    balduzzi,
    linear_networks,
    norm_placement,
    normalisation_free,
    removing_layers,
    schoenholz,
    yang_schoenholz,
)


def test_gradients_of_orthogonal_inputs_correlate_as_the_arc_cosine_kernel_says():
    assert balduzzi.infinite_width(1) == pytest.approx(0.5)  # both active: a quarter; one active: a half
    setting = {"seed": 0, "kind": "plain", "depths": [1, 2, 3], "width": 512, "samples": 32}
    measured = balduzzi.measure(setting)["correlation"]
    assert measured == pytest.approx([balduzzi.infinite_width(d) for d in (1, 2, 3)], abs=0.05)
    assert abs(measured[2] - 2.0**-3) > 0.05


def test_the_theory_of_plain_tanh_networks_has_its_known_limits():
    assert theory.fixed_variance(0.5, 0.0) == pytest.approx(0, abs=1e-9)
    assert theory.chi(0.5, 0.0) == pytest.approx(0.5, rel=1e-6)  # no biases: the network is linear at last
    # In the ordered phase correlations and gradients have the same scale.
    assert theory.correlation_scale(1.0, 0.2) == pytest.approx(-1 / math.log(theory.chi(1.0, 0.2)), rel=1e-6)
    assert theory.mean_square(1e-4) == pytest.approx(1e-4, rel=1e-3)
    # The integral of sech^4 is 4/3.
    assert theory.mean_square_slope(1600) == pytest.approx(4 / 3 / math.sqrt(2 * math.pi * 1600), rel=1e-3)


def test_a_measured_gradient_shrinks_as_chi_says():
    setting = {"seed": 0, "biases": 0.05, "weights": [1.0, 3.0], "depth": 24, "width": 256}
    measured = schoenholz.measure(setting)["log_chi"]
    assert measured == pytest.approx([math.log(theory.chi(w, 0.05)) for w in (1.0, 3.0)], abs=0.03)


def test_a_measured_residual_gradient_grows_as_the_recursion_says():
    setting = {"seed": 0, "weight": 1.0, "biases": 0.05, "depth": 25, "width": 256}
    row = {**setting, **yang_schoenholz.measure(setting)}
    assert row["log_growth"][-1] == pytest.approx(yang_schoenholz.foretold(row)[-1], rel=0.1)
    assert theory.residual_gains(0.0, 0.0, 3, 1.0).tolist() == [1, 1, 1]


def test_a_product_of_identities_has_condition_number_one():
    model = linear_networks.network(3, 12, 2)
    for weight in model.parameters():
        torch.nn.init.zeros_(weight)
    assert torch.linalg.cond(model(torch.eye(3, dtype=torch.float64))) == 1


def test_the_hessian_at_zero_is_the_one_of_the_paper():
    inputs, target = linear_networks.task(0, 3)
    outputs = inputs @ target.T
    # One pair of layers: the second derivative couples W1 and W2 by 2/N (X'X - Y'X).
    coupling = (2 / len(inputs)) * (inputs.T @ inputs - outputs.T @ inputs)
    singular = torch.linalg.svdvals(coupling)
    row = linear_networks.measure({"part": "hessian", "seed": 0, "span": 2, "layers": 6, "width": 3})
    assert row["largest"] == pytest.approx(float(singular[0]))
    assert row["condition"] == pytest.approx(float(singular[0] / singular[-1]))
    single = linear_networks.network(3, 1, None)
    measured = linear_networks.hessian(single, (inputs, outputs))
    assert measured == pytest.approx(np.kron(np.eye(3), 2 / len(inputs) * (inputs.T @ inputs).numpy()))


def test_three_layers_under_a_shortcut_have_no_derivatives_at_zero():
    row = linear_networks.measure({"part": "hessian", "seed": 0, "span": 3, "layers": 6, "width": 2})
    assert (row["largest"], row["gradient"], row["condition"]) == (0, 0, math.inf)


def test_the_mean_square_doubles_without_normalisation_and_stays_with_a_zero_factor():
    def sizes(kind):
        setting = {"part": "variance", "seed": 0, "kind": kind, "blocks": 6, "width": 512}
        return np.array(normalisation_free.measure(setting)["mean_square"])

    assert np.log2(sizes("unscaled")[1:] / sizes("unscaled")[:-1]) == pytest.approx(np.ones(5), abs=0.25)
    for kind in ("SkipInit", "Fixup"):
        assert np.ptp(sizes(kind)) == 0


def test_the_norms_stand_where_the_papers_have_them():
    ids = ss.reference.english(4, context=32)[0]
    torch.manual_seed(0)
    models = {kind: norm_placement.Transformer(kind, 2, 16) for kind in norm_placement.KINDS}
    outputs = {kind: model.blocks(model.tokens(ids)) for kind, model in models.items()}
    for kind in ("post-norm", "DeepNorm"):  # the last thing done is a norm
        assert outputs[kind].square().mean(-1).detach().numpy() == pytest.approx(1, abs=1e-3)
    assert outputs["pre-norm"].square().mean() > 1.5
    assert models["DeepNorm"].blocks[0].scale == pytest.approx(4**0.25)
    # Xavier's variance 2 / (16 + 64), times the square of (8 * 2)^(-1/4).
    assert models["DeepNorm"].blocks[1].branch[0].weight.var().item() == pytest.approx(2 / 80 / 4, rel=0.15)


def test_the_entropy_of_bytes_is_that_of_numpy():
    _, counts = np.unique(ss.reference.english_text().ids.numpy(), return_counts=True)
    shares = counts / counts.sum()
    assert norm_placement.entropy() == pytest.approx(-(shares * np.log(shares)).sum())


def test_with_every_branch_removed_the_model_is_its_embedding_and_head(monkeypatch):
    model = ss.reference.gpt(2, 16, context=8)
    monkeypatch.setattr(removing_layers, "trained", lambda setting: model.eval())
    setting = {"seed": 0, "blocks": 2, "width": 16, "context": 8, "steps": 0, "passages": 4, "sets": 3}
    row = removing_layers.measure(setting)
    inputs, target = removing_layers.passages(16, 8, 0.9, 1.0, seed=0)
    bare = model.lm_head(model.ln_f(model.wte(inputs) + model.wpe(torch.arange(8)))).transpose(1, 2)
    for order in row["orders"].values():
        assert row["loss"] + order[-1] == pytest.approx(F.cross_entropy(bare, target).item(), abs=1e-5)
    # A block alone is its two branches together, and a single cost of `importance` a lesion's own.
    assert len(row["block"]) == 2 and len(row["foretold"]) == 4

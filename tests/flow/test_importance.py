"""Importance against hand-made edits, one at a time."""

import pytest
import torch
from torch import nn

import skipscope as ss
from flow import oracles

mse = nn.functional.mse_loss


class Only(nn.Module):
    """One residual block without its shortcut, or without its branch."""

    def __init__(self, block, keep):
        super().__init__()
        self.block, self.keep = block, keep

    def forward(self, x):
        return x if self.keep == "shortcut" else self.block.mark(self.block.inner(x))


@pytest.fixture(scope="module")
def case():
    model, x = oracles.chain(4), torch.randn(8, 6, dtype=torch.float64)
    return model, x, ss.importance(model, (x, x[:, :3]), mse)


def test_each_edit_costs_what_it_costs_by_hand(case):
    model, x, rank = case
    assert len(rank) == 4 and rank.loss == pytest.approx(mse(model(x), x[:, :3]).item())
    for i, row in enumerate(rank):
        for keep, cost in (("branch", row.removed), ("shortcut", row.lesioned)):
            parts = list(model.parts)
            parts[i] = Only(parts[i], keep)
            loss = mse(oracles.Chain(*parts)(x), x[:, :3]).item()
            assert cost.loss == pytest.approx(loss, rel=1e-10)
            assert cost.loss_cost == pytest.approx(loss - rank.loss, abs=1e-12)


def test_the_cost_in_flow_is_the_change_of_the_fall(case):
    model, x, rank = case
    found = ss.find_shortcuts(model, x)
    for i, row in enumerate(rank):
        flow = ss.gradient_flow(ss.ablate(model, found[i]), (x, x[:, :3]), mse, found=found)
        assert row.removed.fall_decades == pytest.approx(flow.verdict.fall_decades, abs=1e-10)
        assert row.removed.flow_cost == pytest.approx(
            flow.verdict.fall_decades - rank.fall_decades, abs=1e-10
        )


def test_the_ranking_is_by_cost(case):
    costs = [row.removed.loss_cost for row in case[2].ranked]
    assert costs == sorted(costs, reverse=True)


def test_the_model_is_as_found_and_the_result_keeps(case, tmp_path):
    model, _, rank = case
    assert all(p.grad is None for p in model.parameters())
    rank.save(tmp_path / "rank.json")
    assert ss.load(tmp_path / "rank.json") == rank


def test_one_shortcut_out_of_many_may_be_asked_for(case):
    model, x, rank = case
    found = ss.find_shortcuts(model, x)
    one = ss.importance(model, (x, x[:, :3]), mse, found=found[1:2])
    assert len(one) == 1 and one[0] == rank[1]


def test_stale_batch_norms_are_recalibrated_and_it_is_said():
    torch.manual_seed(0)
    model, batch = ss.reference.resnet20().eval(), ss.reference.digits(32)
    found = ss.find_shortcuts(model, batch[0])[:1]
    rank = ss.importance(model, batch, nn.functional.cross_entropy, found=found)
    twin = ss.ablate(model, found, recalibrate=batch)
    with torch.no_grad():
        assert rank[0].removed.loss == pytest.approx(
            nn.functional.cross_entropy(twin(batch[0]), batch[1]).item(), rel=1e-4
        )
    assert any("recalibrated" in note for note in rank.notes)


def test_results_say_what_was_done_to_a_twin(case):
    model, x, _ = case
    found = ss.find_shortcuts(model, x)
    for twin, words in (
        (model, "as built"), (ss.ablate(model, found), "removed"), (ss.ablate(model, found, "detach"), "detached"),
        (ss.ablate(model, found[:1]), "removed (1 of 4)"), (ss.ablate(model, found, strength=0.5), "strength 0.5"),
    ):  # fmt: skip
        assert ss.gradient_flow(twin, (x, x[:, :3]), mse).meaning == words


class Overwriting(nn.Module):
    """Doubles its input in place, or not."""

    def __init__(self, in_place):
        super().__init__()
        self.f, self.head, self.in_place = oracles.layer(4), nn.Linear(4, 2), in_place

    def forward(self, x):
        x = x.mul_(2.0) if self.in_place else x * 2.0
        return self.head(x + self.f(x))


def test_an_input_that_the_model_overwrites_is_the_same_for_each_pass_and_left_as_found():
    torch.manual_seed(0)
    model, x, y = Overwriting(True).double(), torch.randn(3, 4).double(), torch.zeros(3, 2).double()
    before, version, plain = x.clone(), x._version, Overwriting(False).double()
    plain.load_state_dict(model.state_dict())
    got, expected = (ss.importance(m, (x, y), mse) for m in (model, plain))
    assert (got.loss, got[0].removed, got[0].lesioned) == (
        expected.loss,
        expected[0].removed,
        expected[0].lesioned,
    )
    paths = ss.path_spectrum(model, (x, y), mse)
    assert paths.residual < 1e-13
    assert paths.norms == pytest.approx(ss.path_spectrum(plain, (x, y), mse).norms, rel=1e-12)
    splits = [ss.gradient_split(m, (x, y), mse)[0] for m in (model, plain)]
    assert splits[0].shortcut_rms == pytest.approx(splits[1].shortcut_rms, rel=1e-12)
    assert ss.gradient_flow(model, (x, y), mse).loss == expected.loss
    assert torch.equal(x, before) and x._version == version


def test_edits_that_take_turns_on_one_copy_cost_what_twins_cost():
    """Batch norms in training mode change with each pass; every edit begins from the statistics as they are."""
    torch.manual_seed(0)
    model, batch, loss = ss.reference.resnet20(), ss.reference.digits(16), nn.functional.cross_entropy
    found = ss.find_shortcuts(model, batch[0])
    for row, one in zip(ss.importance(model, batch, loss, found=found[:3]), found[:3]):
        for how, cost in (("remove", row.removed), ("lesion", row.lesioned)):
            flow = ss.gradient_flow(ss.ablate(model, one, how), batch, loss, found=found)
            assert (cost.loss, cost.fall_decades, cost.state) == (
                flow.loss, flow.verdict.fall_decades, flow.verdict.state
            )  # fmt: skip


def test_an_edited_twin_is_ranked_too(case):
    model, x, _ = case
    found = ss.find_shortcuts(model, x)
    half = ss.ablate(model, found, strength=0.5)
    rank = ss.importance(half, (x, x[:, :3]), mse, found=found[:1])
    flow = ss.gradient_flow(ss.ablate(half, found[0], "lesion"), (x, x[:, :3]), mse)
    assert rank[0].lesioned.loss == pytest.approx(flow.loss, rel=1e-12)

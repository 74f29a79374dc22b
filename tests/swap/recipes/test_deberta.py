"""DeBERTa-v2 and v3: scores of contents in the kernel, scores of the distances that occur beside them."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from fastattn.swap import swap  # noqa: E402
from fastattn.swap.recipes import deberta as recipe  # noqa: E402

KERNELS = "attention + linear (q, k, v, distances)"
SPELLINGS: dict[str, dict[str, object]] = {
    "v3": {"position_buckets": 4, "share_att_key": True, "pos_att_type": ["p2c", "c2p"], "norm_rel_ebd": "layer_norm"},
    "far": {"position_buckets": 32, "share_att_key": True, "pos_att_type": ["p2c", "c2p"]},
    "own projections": {"position_buckets": 4, "share_att_key": False, "pos_att_type": ["p2c", "c2p"]},
    "no buckets": {"position_buckets": -1, "max_relative_positions": 6, "pos_att_type": ["c2p"]},
    "one way": {"position_buckets": 4, "share_att_key": True, "pos_att_type": ["p2c"]},
    "contents alone": {"pos_att_type": []},
    "no distances": {"relative_attention": False, "pos_att_type": ["c2p"]},
}
spellings = pytest.mark.parametrize("spelling", SPELLINGS)


def deberta(spelling: str = "v3", **options: object) -> nn.Module:
    torch.manual_seed(0)
    settings = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "vocab_size": 64,
        "max_position_embeddings": 48,
        "relative_attention": True,
        "max_relative_positions": -1,
        "position_biased_input": False,
        "type_vocab_size": 0,
        **SPELLINGS[spelling],
        **options,
    }
    model = transformers.DebertaV2Model(transformers.DebertaV2Config(**settings))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def inputs(length: int = 13) -> dict[str, Tensor]:
    ids = torch.randint(2, 64, (4, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(4, length, dtype=torch.long)
    mask[1, 5:], mask[2, :3], mask[3, 4:6] = 0, 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def states(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    """Those of tokens that are not padding."""
    with torch.no_grad():
        found: Tensor = model(**given).last_hidden_state
    return found[given["attention_mask"].bool()] if "attention_mask" in given else found


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance * float(expected.abs().max()), rtol=0)


def attention_rows(report: object) -> list[object]:
    return [row for row in report.rows if row.class_name == "DisentangledSelfAttention"]


def attentions(model: nn.Module) -> list[nn.Module]:
    return [layer.attention.self for layer in model.encoder.layer]


@spellings
@pytest.mark.parametrize("padded", [True, False])
def test_the_states_are_those_of_the_original(spelling, padded) -> None:
    model, given = deberta(spelling), inputs()
    if not padded:
        del given["attention_mask"]
    original = states(model, given)
    report = swap(model)
    with report.counting():
        found = states(model, given)
    assert_close(found, original)
    assert [(row.kernel, row.calls, row.fallbacks) for row in attention_rows(report)] == [(KERNELS, 1, {})] * 2
    report.undo()
    assert torch.equal(states(model, given), original)


@pytest.mark.parametrize("length", [1, 2, 40])
def test_short_and_long(length) -> None:
    model, given = deberta(), {"input_ids": inputs(length)["input_ids"]}
    expected = states(model, given)
    swap(model)
    assert_close(states(model, given), expected)


def test_distances_that_do_not_occur_are_not_projected(monkeypatch) -> None:
    model, given = deberta("far"), inputs()
    swap(model)
    projected: dict[str, int] = {}
    real = recipe.linear

    def noted(module: nn.Module, name: str, x: Tensor, part: str) -> Tensor:
        projected[name] = x.shape[1]
        return real(module, name, x, part)

    monkeypatch.setattr(recipe, "linear", noted)
    states(model, given)
    # Of the 64 rows for buckets of 32 those from -12 to 12; in the end the same linear projects these.
    assert projected == {"query_proj": 25, "key_proj": 25, "value_proj": 13}


@spellings
def test_it_trains_as_the_original(spelling) -> None:
    model, given = deberta(spelling), inputs()
    twin = copy.deepcopy(model)
    swap(model)
    rows = given["attention_mask"].bool()
    for each in (model, twin):
        each(**given).last_hidden_state[rows].square().sum().backward()
    for (path, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        if other.grad is None:
            assert parameter.grad is None, path
            continue
        scale = max(float(other.grad.abs().max()), 0.1)  # a bias of all keys may get rounding
        torch.testing.assert_close(parameter.grad, other.grad, atol=1e-4 * scale, rtol=0, msg=path)


def test_dropout_is_drawn_in_training_alone() -> None:
    model, given = deberta(attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.0), inputs()
    expected = states(model, given)
    swap(model)
    model.train()
    drops = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drops.append(states(model, given))
    assert torch.equal(drops[0], drops[1])
    assert not torch.equal(drops[0], drops[2])
    assert_close(states(model.eval(), given), expected)


def test_the_dropout_of_distances_is_the_originals() -> None:
    """Drawn by torch as before: the same numbers."""
    model, given = deberta(attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0), inputs()
    for attention in attentions(model):
        attention.pos_dropout.p = 0.5
    model.train()
    twin = copy.deepcopy(model)
    swap(model)
    found = []
    for each in (model, twin):
        torch.manual_seed(0)
        found.append(states(each, given))
    assert_close(*found)


def test_attention_weights_come_from_the_original() -> None:
    model, given = deberta(), inputs()
    with torch.no_grad():
        expected = model(**given, output_attentions=True).attentions
        report = swap(model)
        with report.counting():
            found = model(**given, output_attentions=True).attentions
    rows = given["attention_mask"].bool()
    for one, other in zip(found, expected, strict=True):
        assert_close(one.transpose(1, 2)[rows], other.transpose(1, 2)[rows])
    reason = "the attention weights are asked for (output_attentions=True)"
    assert [row.fallbacks for row in attention_rows(report)] == [{reason: 1}] * 2


def _hook(attention: nn.Module) -> None:
    attention.key_proj.register_forward_hook(lambda module, args, out: 2 * out)


def _replace(attention: nn.Module) -> None:
    attention.disentangled_attention_bias = lambda query, *others: torch.zeros(())


@pytest.mark.parametrize(
    ("change", "reason"),
    [(_hook, "key_proj has hooks"), (_replace, "its disentangled_attention_bias was replaced")],
)
def test_what_is_not_plain_runs_as_it_is(change: Callable[[nn.Module], None], reason: str) -> None:
    model, given = deberta(), inputs()
    twin = copy.deepcopy(model)
    report = swap(model)
    for each in (model, twin):
        change(attentions(each)[0])
    with report.counting():
        found = states(model, given)
    assert_close(found, states(twin, given))
    assert [list(row.fallbacks) for row in attention_rows(report)] == [[reason], []]


def test_a_linear_that_is_called_gets_every_distance() -> None:
    """As in the original: a quantised one takes the range of all that it is given for its scale."""
    model, given = deberta("far"), inputs()
    given["attention_mask"].fill_(1)  # rows of padding differ
    twin = copy.deepcopy(model)
    swap(model)
    for each in (model, twin):
        for attention in attentions(each):
            attention.query_proj.register_forward_hook(lambda module, args, out: out / args[0].abs().amax())
    assert_close(states(model, given), states(twin, given))


def test_distances_of_its_own_run_the_original() -> None:
    """A module that is called without distances makes them; of another shape they are its own affair."""
    model = deberta()
    twin = copy.deepcopy(model)
    report = swap(model)
    x, mask = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(2)), torch.ones(2, 1, 9, 9)
    with torch.no_grad(), report.counting():
        found, expected = (
            attentions(each)[0](x, mask, rel_embeddings=each.encoder.get_rel_embedding())[0] for each in (model, twin)
        )
    assert_close(found, expected)
    (reason,) = attention_rows(report)[0].fallbacks
    assert reason == "its distances are not given, or differ between samples"


def test_half_precision_is_no_worse_than_the_original() -> None:
    model, given = deberta(), inputs()
    expected = states(model, given)
    model.to(torch.bfloat16)
    theirs = float((states(model, given).float() - expected).abs().max())
    swap(model)
    found = states(model, given)
    assert found.dtype is torch.bfloat16
    assert float((found.float() - expected).abs().max()) <= 1.5 * theirs


def test_saved_and_copied_it_stays_swapped() -> None:
    model, given = deberta(), inputs()
    swap(model)
    expected = states(model, given)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(states(other, given), expected)


@spellings
def test_it_compiles_as_one_graph(spelling) -> None:
    model, given = deberta(spelling), inputs()
    expected = states(model, given)
    swap(model)
    torch.compiler.reset()
    assert_close(states(torch.compile(model, fullgraph=True, backend="aot_eager"), given), expected)

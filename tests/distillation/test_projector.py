"""Projectors: grids of any size, what they own, what they refuse."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from scalekd.distillation import ConvProjector, CrossAttentionProjector, default_num_heads
from scalekd.errors import UsageError


def _projector(**changes: object) -> CrossAttentionProjector:
    torch.manual_seed(0)
    arguments: dict[str, object] = {
        "student_channels": 6,
        "student_grid": (5, 3),
        "teacher_channels": 8,
        "query_grid": (2, 4),
        "num_heads": 2,
    }
    return CrossAttentionProjector(**{**arguments, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("student_grid", [(1, 1), (7, 7), (3, 8)])
@pytest.mark.parametrize("query_grid", [(1, 1), (16, 16), (2, 5)])
def test_any_grid_answers_any_grid(
    student_grid: tuple[int, int], query_grid: tuple[int, int]
) -> None:
    tokens = query_grid[0] * query_grid[1]
    x = torch.randn(3, 6, *student_grid)
    learned = _projector(student_grid=student_grid, query_grid=query_grid)
    given = _projector(student_grid=student_grid, query_grid=query_grid, learned_query=False)
    conv = ConvProjector(
        student_channels=6,
        student_grid=student_grid,
        teacher_channels=8,
        query_grid=query_grid,
    )
    assert learned(x).shape == (3, tokens, 8)
    assert given(x, torch.randn(3, tokens, 8)).shape == (3, tokens, 8)
    assert conv(x).shape == (3, tokens, 8)


def test_attention_by_loops() -> None:
    projector = _projector(softmax_scale=5.0).eval()
    x = torch.randn(2, 6, 5, 3)
    stem = projector.stem.norm(projector.stem.conv(x)).relu() + projector.pos_embed
    keys = stem.flatten(2).transpose(1, 2)
    assert projector.query_embed is not None
    q = projector.q(projector.query_proj(projector.query_embed).relu())
    k, v = projector.k(keys), projector.v(keys)
    heads = []
    for head in (slice(0, 4), slice(4, 8)):
        scores = q[:, head] @ k[..., head].transpose(1, 2) * 5 / 2  # head width 4
        heads.append(scores.softmax(dim=-1) @ v[..., head])
    tokens = projector.norm(projector.out(torch.cat(heads, dim=-1)))
    expected = tokens + projector.fc2(projector.fc1(tokens).relu())
    torch.testing.assert_close(projector(x), expected)


def test_fused_attention_gets_queries_of_every_view_in_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    strides: list[int] = []
    attention = functional.scaled_dot_product_attention

    def noted(query: torch.Tensor, *arguments: torch.Tensor, **named: float) -> torch.Tensor:
        strides.append(query.stride(0))
        return attention(query, *arguments, **named)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", noted)
    _projector()(torch.randn(3, 6, 5, 3))
    assert strides == [8 * 8]  # tokens x channels


def test_no_parameter_is_left_without_use() -> None:
    x = torch.randn(3, 6, 5, 3)
    for projector, query in (
        (_projector(), None),
        (_projector(learned_query=False), torch.randn(3, 8, 8)),
        (_projector(norm="layer"), None),
    ):
        projector(x, query).square().sum().backward()
        assert all(p.grad is not None for p in projector.parameters())
    names = dict(_projector(learned_query=False).named_parameters())
    assert "query_embed" not in names


def test_batch_norm_shares_statistics_and_layer_norm_does_not() -> None:
    x = torch.randn(4, 6, 5, 3, dtype=torch.float64)
    for norm, independent in (("batch", False), ("layer", True)):
        projector = _projector(norm=norm).double()
        alone, together = projector(x[:1]), projector(x)[:1]
        assert torch.allclose(alone, together, atol=1e-12) == independent


def test_learned_parts_start_as_published() -> None:
    projector = _projector(student_grid=(20, 20), query_grid=(20, 20))
    assert projector.query_embed is not None
    assert projector.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)
    assert projector.query_embed.std().item() == pytest.approx(1, rel=0.1)
    assert projector.no_weight_decay() == {"pos_embed"}


def test_heads_that_do_not_divide_are_refused_with_those_that_do() -> None:
    with pytest.raises(UsageError, match=r"width 12 .* 5 attention heads.* 1, 2, 3, 4, 6, 12"):
        _projector(teacher_channels=12, num_heads=5)


def test_default_heads_are_about_64_wide() -> None:
    widths = (384, 768, 1024, 1536, 96, 7)
    assert [default_num_heads(width) for width in widths] == [6, 12, 16, 24, 2, 1]


def test_other_inputs_than_built_for_are_refused() -> None:
    learned, given = _projector(), _projector(learned_query=False)
    x, query = torch.randn(2, 6, 5, 3), torch.randn(2, 8, 8)
    with pytest.raises(ValueError, match=r"6 channels on a 5 x 3 grid and got .*\(2, 6, 3, 5\)"):
        learned(x.transpose(2, 3))
    with pytest.raises(ValueError, match="learns its queries"):
        learned(x, query)
    with pytest.raises(ValueError, match=r"\(batch, 8, 8\).* 2 x 4 query grid.* got none"):
        given(x)
    with pytest.raises(ValueError, match=r"got \(2, 7, 8\)"):
        given(x, query[:, :7])
    with pytest.raises(UsageError, match="unknown projector norm 'group'"):
        _projector(norm="group")


def test_conv_projector_averages_over_teacher_cells() -> None:
    conv = ConvProjector(
        student_channels=1, student_grid=(2, 4), teacher_channels=1, query_grid=(1, 2)
    ).eval()
    with torch.no_grad():  # the stem passes positive maps on unchanged
        conv.stem.norm = nn.Identity()  # type: ignore[assignment]
        conv.stem.conv.weight.zero_()[0, 0, 1, 1] = 1
        conv.stem.conv.bias.zero_()  # type: ignore[union-attr]
        conv.proj.weight.fill_(1)
        conv.proj.bias.zero_()  # type: ignore[union-attr]
    x = torch.tensor([[[[1.0, 2, 3, 4], [5, 6, 7, 8]]]])
    assert conv(x).flatten().tolist() == [3.5, 5.5]


@pytest.mark.parametrize("learned_query", [True, False])
def test_compiles_without_a_graph_break(learned_query: bool) -> None:
    projector = _projector(learned_query=learned_query)
    arguments = [torch.randn(2, 6, 5, 3)]
    if not learned_query:
        arguments.append(torch.randn(2, 8, 8))
    compiled = torch.compile(projector, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), projector(*arguments))

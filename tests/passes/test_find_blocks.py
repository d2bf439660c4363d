"""Blocks come from the dataflow: a match, a near miss and a name for each kind."""

from __future__ import annotations

import torch
from conftest import TinyTransformer, make_calls, tiny_dit, tiny_unet

import fxmask


def capture(model: torch.nn.Module, width: int = 8) -> fxmask.Program:
    torch.manual_seed(0)
    return fxmask.capture(model.eval(), {"x": torch.randn(2, width), "t": torch.tensor(3)})


def linear(width: int = 8, out: int | None = None) -> torch.nn.Linear:
    return torch.nn.Linear(width, out or width)


def names(program: fxmask.Program, kind: str = "branch") -> list[str]:
    return [block.name for block in program.blocks if block.kind == kind]


class Base(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = linear(), linear(), linear(), linear()


def test_transformer_branches_are_cut_before_their_gates(tiny):
    branches = tiny.branches
    assert [b.name for b in branches] == [f"layers.{i}{part}" for i in (0, 1) for part in ("", ".mlp")] or len(branches) == 4
    for block in branches:
        (value,) = (tiny.node(v) for v in block.values)
        users = {str(user.target) for user in value.users}
        assert users == {"aten.mul.Tensor"}, "the gate is applied to the cached value, so it stays fresh"


def test_chain_without_residuals_has_no_branch():
    class Chain(Base):
        def forward(self, x, t):
            return self.d(self.c(self.b(self.a(x).relu()).relu()).relu())

    program = capture(Chain())
    assert names(program) == []
    assert names(program, "output") == ["output"]
    assert len(names(program, "stage")) >= 2


def test_residual_operands_in_either_order():
    class Either(Base):
        def forward(self, x, t):
            x = x + self.b(self.a(x).relu())
            return self.d(self.c(x).relu()) + x

    assert len(names(capture(Either()))) == 2


def test_convolution_shortcut():
    class Shortcut(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = torch.nn.Conv2d(2, 4, 3, padding=1)
            self.two = torch.nn.Conv2d(4, 4, 3, padding=1)
            self.shortcut = torch.nn.Conv2d(2, 4, 1)

        def forward(self, x, t):
            return self.shortcut(x) + self.two(self.one(x).relu())

    torch.manual_seed(0)
    program = fxmask.capture(Shortcut().eval(), {"x": torch.randn(2, 2, 4, 4), "t": torch.tensor(3)})
    (block,) = program.branches
    assert block.macs == 2 * 16 * 9 * (2 * 4 + 4 * 4)


def test_two_equal_halves_are_no_shortcut():
    class Halves(Base):
        def forward(self, x, t):
            return self.a(x).relu() + self.b(x).relu()

    assert names(capture(Halves())) == []


def test_adding_a_time_embedding_is_no_residual():
    class Embedded(Base):
        def forward(self, x, t):
            time = self.a(t.reshape(-1, 1).float().expand(-1, 8))
            return self.b(x) + time

    assert names(capture(Embedded())) == []


def test_parallel_branches():
    class Sum(Base):  # x + (f(h) + g(h)): one block
        def forward(self, x, t):
            h = x.tanh()
            return x + (self.a(h) + self.b(h))

    class Chained(Base):  # (x + f(h)) + g(h): two blocks
        def forward(self, x, t):
            h = x.tanh()
            return x + self.a(h) + self.b(h)

    assert len(names(capture(Sum()))) == 1
    assert names(capture(Chained())) == ["a", "b"]


def test_nested_branches_keep_the_inner_ones_if_they_own_most():
    class Inner(Base):
        def forward(self, x, t):
            h = x.tanh()
            h = h + self.a(h)
            h = h + self.b(h)
            return x + h * 2

    class Outer(Base):
        def forward(self, x, t):
            h = self.d(self.c(self.b(x)))
            h = h + self.a(h)
            return x + h

    assert names(capture(Inner())) == ["a", "b"]
    assert len(names(capture(Outer()))) == 1


def test_postponed_norm_is_part_of_the_branch():
    class PostNorm(Base):
        def forward(self, x, t):
            return x + torch.nn.functional.layer_norm(self.b(self.a(x).relu()), (8,))

    program = capture(PostNorm())
    (block,) = program.branches
    assert "layer_norm" in str(program.node(block.values[0]).target)


def test_sample_dependent_gate_belongs_to_the_branch():
    class Squeeze(Base):
        def forward(self, x, t):
            return x + torch.sigmoid(self.a(x)) * self.b(x)

    program = capture(Squeeze())
    (block,) = program.branches
    assert str(program.node(block.values[0]).target) == "aten.mul.Tensor"


def test_addcmul_is_a_residual():
    class Fused(Base):
        def forward(self, x, t):
            gate = torch.cos(t.reshape(-1, 1).float())
            return torch.addcmul(x, gate.expand(-1, 8), self.b(self.a(x).relu()))

    assert len(names(capture(Fused()))) == 1


def test_branches_are_disjoint_and_account_for_their_macs():
    call = {"hidden_states": torch.randn(2, 1, 16, 16), "timestep": torch.tensor([1, 1]), "class_labels": torch.tensor([1, 2])}
    program = fxmask.capture(tiny_dit(sample_size=16, attention_head_dim=32), call)
    assert names(program) == [f"transformer_blocks.{i}.{part}" for i in range(2) for part in ("attn1", "ff")]
    assert sum(b.macs for b in program.branches) >= 0.9 * program.macs
    assert sum(b.macs for b in program.branches) <= program.macs


def test_unet_blocks_have_names_that_a_person_recognises(unet_program):
    assert {"down_blocks.0.resnets.0", "down_blocks.1.attentions.0", "mid_block.resnets.1", "up_blocks.1.resnets.1"} <= set(
        names(unet_program)
    )
    stages = [b for b in unet_program.blocks if b.kind == "stage"]
    assert max(b.macs for b in stages) >= 0.6 * unet_program.macs
    (output,) = (b for b in unet_program.blocks if b.kind == "output")
    assert output.macs == unet_program.macs
    assert output.bytes == 8 * 8 * 4


def test_full_unet_coverage():
    program = fxmask.capture(tiny_unet(layers_per_block=2), {"sample": torch.randn(2, 1, 8, 8), "timestep": 3})
    largest = max(b.macs for b in program.blocks if b.kind == "stage")
    assert largest >= 0.8 * program.macs


def test_summary_is_a_table(tiny):
    text = tiny.summary()
    assert "TinyTransformer" in text
    for block in tiny.blocks:
        assert block.name in text


def test_no_model_class_is_named_in_the_library():
    """Blocks are found without knowledge of any architecture: no adapter, registry or table of class names."""
    from pathlib import Path

    import diffusers

    root = Path(__file__).parents[2]
    models = [
        name for name in dir(diffusers) if name.endswith(("Model", "Transformer2DModel", "Transformer3DModel", "Pipeline"))
    ]
    source = "\n".join(p.read_text() for folder in ("fxmask", "passes", "backends") for p in (root / folder).glob("*.py"))
    assert len(models) > 50
    assert [name for name in models if name in source] == []


def test_weights_shared_by_two_applications():
    class Shared(Base):
        def forward(self, x, t):
            x = x + self.a(x).relu()
            return x + self.a(x).relu()

    program = capture(Shared())
    assert len(names(program)) == 2
    assert len(set(names(program))) == 2


def test_tiny_transformer_owns_its_macs():
    program = fxmask.capture(TinyTransformer(depth=4).eval(), make_calls()[0])
    assert sum(b.macs for b in program.branches) >= 0.9 * program.macs


class Streams(torch.nn.Module):
    """Two streams that attend to each other; each has a projection of its own, or they share one."""

    def __init__(self, layers: int = 2, shared_projection: bool = False, rotate: bool = False) -> None:
        super().__init__()
        self.text = torch.nn.Parameter(torch.randn(1, 3, 8))
        self.qkv = torch.nn.ModuleList(linear(8, 24) for _ in range(layers))
        self.image_out = torch.nn.ModuleList(linear() for _ in range(layers))
        self.text_out = torch.nn.ModuleList(linear() for _ in range(layers))
        self.head = linear()
        self.shared_projection, self.rotate = shared_projection, rotate

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        text = self.text.expand(x.shape[0], -1, -1)
        for qkv, image_out, text_out in zip(self.qkv, self.image_out, self.text_out, strict=True):
            q, k, v = qkv(torch.cat([text, x], 1)).chunk(3, -1)
            if self.rotate:
                q = q * 0.8 + torch.cat([-q[..., 4:], q[..., :4]], -1) * 0.6
            mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            if self.shared_projection:
                mixed = image_out(mixed)
                x, text = x + mixed[:, 3:], text + mixed[:, :3]
            else:
                x, text = x + image_out(mixed[:, 3:]), text + text_out(mixed[:, :3])
        return self.head(torch.cat([x, text], 1))[:, :-3] * t.reshape(-1, 1, 1).cos()


def capture_tokens(model: torch.nn.Module) -> fxmask.Program:
    torch.manual_seed(0)
    return fxmask.capture(model.eval(), {"x": torch.randn(2, 6, 8), "t": torch.tensor(3)})


def test_joint_attention_is_one_block():
    for rotate in (False, True):
        program = capture_tokens(Streams(rotate=rotate))
        assert [len(block.values) for block in program.branches] == [2, 2], "a rotation is no residual"
        assert program.coverage(("branch",)) >= 0.9


def test_slices_of_one_value_are_cut_before_they_are_sliced():
    program = capture_tokens(Streams(shared_projection=True))
    assert names(program) == ["image_out.0", "image_out.1"] or len(names(program)) == 2
    assert [len(block.values) for block in program.branches] == [1, 1]
    assert sum(b.macs for b in program.branches) >= 0.9 * program.macs


def test_projection_shared_by_parallel_branches():
    class Parallel(Base):
        def forward(self, x, t):
            both = self.d(x)
            return x + self.a(both[:, :8]) + self.b(both[:, 8:])

    class Apart(Parallel):
        def forward(self, x, t):
            h = torch.nn.functional.layer_norm(x, (8,))
            return x + self.a(h) + self.b(h)

    torch.manual_seed(0)
    parallel = Parallel()
    parallel.d = linear(8, 16)
    (block,) = capture(parallel).branches
    assert block.macs == capture(parallel).macs
    assert names(capture(Apart())) == ["a", "b"], "a norm is cheap: each can be skipped by itself"


def test_dense_experts_are_one_block():
    class Experts(torch.nn.Module):
        def __init__(self, form: str, count: int) -> None:
            super().__init__()
            self.form, self.router, self.head = form, linear(8, count), linear()
            self.experts = torch.nn.ModuleList(
                torch.nn.Sequential(linear(8, 16), torch.nn.ReLU(), linear(16, 8)) for _ in range(count)
            )

        def forward(self, x, t):
            h = x.tanh()
            weights = self.router(h).softmax(-1)
            terms = [weights[:, k, None] * expert(h) for k, expert in enumerate(self.experts)]
            if self.form == "stack":
                return self.head(x + torch.stack(terms).sum(0))
            total = x if self.form == "chain" else torch.zeros_like(x)
            for term in terms:
                total = total + term
            return self.head(total if self.form == "chain" else x + total)

    for form in ("stack", "sum", "chain"):
        for count in (2, 3, 4, 6):
            program = capture(Experts(form, count))
            assert len(program.branches) == 1, (form, count, program.summary())
            assert program.branches[0].macs == program.macs - 2 * 64, "everything but the head"


def test_small_blocks_are_merged_into_a_neighbour():
    class Small(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.big = torch.nn.ModuleList(
                torch.nn.Sequential(linear(8, 512), torch.nn.ReLU(), linear(512, 8)) for _ in range(3)
            )
            self.small = torch.nn.ModuleList(torch.nn.Linear(8, 1) for _ in range(3))

        def forward(self, x, t):
            for big, small in zip(self.big, self.small, strict=True):
                x = x + big(x)
                x = x + small(x).expand(-1, 8)
            return x

    program = capture(Small())
    assert len(program.branches) == 3
    assert all(len(block.values) == 2 for block in program.branches)
    assert sum(block.macs for block in program.branches) == program.macs


def test_text_that_only_a_later_attention_reads():
    """The text branch of the first layer lies inside the attention of the second, and still goes with its own layer."""

    class Last(Streams):
        def forward(self, x, t):
            text = self.text.expand(x.shape[0], -1, -1)
            for i, qkv in enumerate(self.qkv):
                mixed = torch.nn.functional.scaled_dot_product_attention(*qkv(torch.cat([text, x], 1)).chunk(3, -1))
                x = x + self.image_out[i](mixed[:, 3:])
                if i == 0:
                    text = text + self.text_out[i](mixed[:, :3])
            return self.head(x)

    program = capture_tokens(Last())
    assert [len(block.values) for block in program.branches] == [2, 1]
    assert sum(block.macs for block in program.branches) <= program.macs
    assert program.coverage(("branch",)) >= 0.9


def test_the_stream_may_be_scaled():
    class Blend(Base):  # alpha * x + (1 - alpha) * f(x)
        def forward(self, x, t):
            return self.d(x * 0.3 + self.b(self.a(x).relu()) * 0.7)

    assert len(names(capture(Blend()))) == 1

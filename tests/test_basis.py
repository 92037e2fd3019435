"""Bases as types: what each rule accepts, what it refuses, and that a refusal names the node."""

from __future__ import annotations

import pytest
import torch
from strategies import traced

from hadagraph import ops
from hadagraph.basis import BASIS_RULES, BasisError, infer_bases
from hadagraph.graph import aten
from hadagraph.rotation import Rotation

H16, H32 = Rotation(16), Rotation(32)
rotate = ops.rotate


def plain(x, dim=1, rotation="h16", size=None):
    return ops.unrotate(x, dim, rotation, x.shape[dim] if size is None else size)


def basis_of(function, *shapes):
    """The bases of the call nodes of a graph, by target."""
    graph = traced(function, *(torch.randn(shape) for shape in shapes)).graph
    return {n.target: basis for n, basis in infer_bases(graph).items() if n.op != "placeholder"}


ACCEPTED = {
    "gemm contracts equal rotations": lambda x, y: ops.gemm(
        rotate(x, 1, "h16"), rotate(y, 1, "h16"), None
    ),
    "gemm keeps the rotation of kept dims": lambda x, y: plain(
        plain(ops.gemm(rotate(x, 0, "h16"), rotate(y, 0, "h32"), None), 0), 1, "h32"
    ),
    "two dims": lambda x, y: plain(plain(rotate(rotate(x, 0, "h16"), 1, "h16"), 0), 1),
    "permute": lambda x, y: plain(rotate(x, 0, "h16").permute(1, 0)),
    "t": lambda x, y: plain(aten.t.default(rotate(x, 0, "h16"))),
    "transpose": lambda x, y: plain(aten.transpose.int(rotate(x, 0, "h16"), -1, -2)),
    "view keeps the last dim": lambda x, y: plain(rotate(x, 1, "h16").view(2, 16, 32), 2),
    "neg": lambda x, y: plain(-rotate(x, 1, "h16")),
    "clone": lambda x, y: plain(rotate(x, 1, "h16").clone()),
    "add": lambda x, y: plain(rotate(x, 1, "h16") + rotate(y, 1, "h16")),
    "sub": lambda x, y: plain(aten.sub.Tensor(rotate(x, 1, "h16"), rotate(y, 1, "h16"), alpha=2)),
    "plain broadcasting add": lambda x, y: x + y[:1],
    "plain add of a number": lambda x, y: x + 1,
    "plain gemm with bias": lambda x, y: ops.gemm(x, y, y[:, 0]),
    "an unknown op on plain tensors": lambda x, y: torch.relu(x).sum() + y.max(dim=1)[0],
    "scaled_mm": lambda x, y: ops.scaled_mm(
        *(ops.quantize_rows(t, "int8/per_kept_index/h16")[0] for t in (x, y)),
        x[:, 0],
        y[:, 0],
        None,
        torch.float32,
    ),
}
ENCODING = "fp4_e2m1/block_contracted(32)/e8m0"


def encoded(x, encoding=ENCODING, dim=1):
    return ops.encode(x, None, encoding, dim, 0)


def encoded_mm(x, y, bias=None):
    return ops.encoded_mm(*x, *y, bias, ENCODING, ENCODING, torch.float32)


ACCEPTED |= {
    "codes of a rotated tensor": lambda x, y: plain(
        ops.scaled_mm(
            ops.quantize_columns(rotate(x, 1, "h16"), "int8/per_tensor")[0],
            ops.quantize_rows(y, "int8/per_tensor")[0],
            x[:, 0],
            y[:, 0],
            None,
            torch.float32,
        ),
        0,
    ),
    "encoded of a rotated and a rotating one": lambda x, y: encoded_mm(
        encoded(rotate(x, 1, "h32")), encoded(y, ENCODING + "/h32")
    ),
    "encoded along the first dim keeps the other": lambda x, y: plain(
        encoded_mm(encoded(x, dim=0), encoded(rotate(y, 1, "h16"), dim=0)), 1
    ),
    "decoded codes are in their basis": lambda x, y: plain(
        ops.decode(*encoded(x, ENCODING + "/h32"), ENCODING + "/h32", 1, 32, torch.float32),
        1,
        "h32",
    ),
    "projected and taken back": lambda x, y: ops.unproject(
        torch.mm(ops.project(x, 0, 8, 16), y), 0, 8, 16, 32
    ),
    "a mask in the rotated basis": lambda x, y: plain(
        torch.where(x > 0, rotate(x, 1, "h16"), torch.zeros(()))
    ),
}
REFUSED = {
    "a rotated output": (lambda x, y: rotate(x, 1, "h16"), "rotate.*graph output, but rotated"),
    "gemm of different blocks": (
        lambda x, y: ops.gemm(rotate(x, 1, "h16"), rotate(y, 1, "h32"), None),
        "gemm.*contracts h16 with h32",
    ),
    "gemm of different signs": (
        lambda x, y: ops.gemm(rotate(x, 1, "h16"), rotate(y, 1, "h16:fixed(1)"), None),
        r"gemm.*contracts h16 with h16:fixed\(1\)",
    ),
    "gemm of rotated and plain": (
        lambda x, y: ops.gemm(rotate(x, 1, "h16"), y, None),
        "gemm.*contracts h16 with None",
    ),
    "a bias on a rotated output": (
        lambda x, y: plain(ops.gemm(x, rotate(y, 0, "h16"), y[:, 0])),
        "gemm.*adds a plain bias",
    ),
    "rotating twice": (
        lambda x, y: plain(rotate(rotate(x, 1, "h16"), 1, "h16")),
        "rotate_1.*rotated already",
    ),
    "the wrong inverse": (
        lambda x, y: plain(rotate(x, 1, "h16"), 1, "h32"),
        "unrotate.*un-rotates h32, but finds h16",
    ),
    "the wrong dim": (lambda x, y: plain(rotate(x, 1, "h16"), 0), "unrotate.*finds None"),
    "a view that regroups": (
        lambda x, y: plain(rotate(x, 1, "h16").view(32, 2, 16), 2),
        "view.*regroups a rotated dim",
    ),
    "a view of a rotated first dim": (
        lambda x, y: plain(rotate(x, 0, "h16").view(2, 16, 32), 1),
        "view.*regroups a rotated dim",
    ),
    "a nonlinearity": (lambda x, y: plain(torch.relu(rotate(x, 1, "h16"))), "relu.*takes rotate"),
    "a reduction": (lambda x, y: rotate(x, 1, "h16").sum(), "sum.*takes rotate"),
    "adding a number": (lambda x, y: plain(rotate(x, 1, "h16") + 1), "add.*adds a number"),
    "adding a plain tensor": (
        lambda x, y: plain(rotate(x, 1, "h16") + y),
        "add.*adds tensors in different bases",
    ),
    "adding by broadcasting": (
        lambda x, y: plain(rotate(x, 1, "h16") + rotate(y[:1], 1, "h16")),
        "add.*adds tensors in different bases",
    ),
    "quantizing a rotated tensor": (
        lambda x, y: ops.quantize_rows(rotate(x, 1, "h16"), "int8/per_tensor/h32")[1],
        "quantize_rows.*quantizes a rotated tensor",
    ),
    "scaled_mm of different rotations": (
        lambda x, y: ops.scaled_mm(
            ops.quantize_rows(x, "int8/per_tensor/h16")[0],
            ops.quantize_rows(y, "int8/per_tensor/h32")[0],
            x[:, 0],
            y[:, 0],
            None,
            torch.float32,
        ),
        "scaled_mm.*contracts h16 with h32",
    ),
    "encoded_mm of different rotations": (
        lambda x, y: encoded_mm(encoded(x, ENCODING + "/h32"), encoded(y)),
        "encoded_mm.*contracts h32 with None",
    ),
    "a bias on rotated codes": (
        lambda x, y: encoded_mm(encoded(x), encoded(rotate(y, 0, "h16")), y[:, 0]),
        "encoded_mm.*adds a plain bias",
    ),
    "a projection that is not taken back": (
        lambda x, y: ops.project(x, 0, 8, 16),
        "project.*graph output, but rotated",
    ),
    "a mask of rotated values": (
        lambda x, y: torch.where(x > 0, torch.zeros(()), rotate(x, 1, "h16")),
        "where.*different bases",
    ),
    "a plain op on rotated codes": (
        lambda x, y: ops.quantize_rows(x, "int8/per_tensor/h16")[0].float(),
        "takes getitem",
    ),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepts(name):
    basis_of(ACCEPTED[name], (32, 32), (32, 32))


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_and_names_the_node(name):
    function, message = REFUSED[name]
    with pytest.raises(
        BasisError, match=f"basis: {message}" if name != "a plain op on rotated codes" else message
    ):
        basis_of(function, (32, 32), (32, 32))


def test_the_inferred_bases():
    found = basis_of(
        lambda x, y: plain(
            ops.gemm(rotate(x, 1, "h16"), rotate(rotate(y, 1, "h16"), 0, "h32"), None), 1, "h32"
        ),
        (3, 32),
        (32, 32),
    )
    assert found[ops.gemm] == (None, H32)
    assert found[ops.rotate] == (H32, H16)
    assert found[ops.unrotate] == (None, None)


def test_codes_carry_the_rotation_on_the_contracted_dim_which_comes_last():
    found = basis_of(
        lambda x: ops.quantize_both(x, "int8/per_kept_index/h16", "int8/per_tensor/h32")[1],
        (32, 48),
    )
    assert found[ops.quantize_both] == ((None, H16), (None,), (None, H32), (None,))


def test_views_of_symbolic_batches_keep_the_last_dim():
    gm = traced(
        lambda x: plain(rotate(x, 2, "h16").view(x.shape[0] * x.shape[1], 32), 1, size=32),
        torch.randn(4, 5, 32),
        mode="symbolic",
    )
    gm.graph.eliminate_dead_code()
    view = next(n for n in gm.graph.nodes if n.target in (aten.view.default, aten.reshape.default))
    assert infer_bases(gm.graph)[view] == (None, H16)


def test_every_op_of_ours_has_a_rule():
    assert {getattr(torch.ops.hadagraph, name).default for name in ops.SCHEMAS} <= set(BASIS_RULES)

"""``torch.func``'s transforms and forward-mode derivatives: the reference's, and right, or an error that names it."""

import pytest
import torch
from torch import func
from torch.autograd import forward_ad

from tests.support.checks import BACKBONES, INNERS, assert_close, inner_inputs, make_layer, run_inner
from ttt4rec import TTT4Rec, TTT4RecConfig
from ttt4rec.arguments import FullSoftmax
from ttt4rec.models import full_softmax
from ttt4rec.models.mixers import MIXERS
from ttt4rec.operators import CONVOLUTIONS, OPERATORS, output

WIDTH, STEP = 8, 1e-5
NAMES = {
    *(f"{name}_{scan}{kind}" for name in INNERS for scan in ("scan", "forgetting_scan") for kind in ("", "_backward")),
    *(f"convolution_{count}{kind}" for count in (1, 2) for kind in ("", "_backward")),
    *(f"{name}{kind}" for name in ("projection", "output") for kind in ("", "_backward")),
    *(f"full_softmax_{name}{kind}" for name in ("nll", "total_nll") for kind in ("", "_backward")),
    "token_step",
    "forgetting_token_step",
}
REFUSED = 'use backend="reference"'
MASK = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
all_layers = pytest.mark.parametrize(
    ("inner", "backbone"), [(inner, backbone) for inner in INNERS for backbone in BACKBONES]
)


def slope(f, x, v):
    """The directional derivative by central differences, whose error is about STEP² and rounding over STEP."""
    with torch.no_grad():
        return (f(x + STEP * v) - f(x - STEP * v)) / (2 * STEP)


def tangent_of(f, x, v):
    """By forward mode alone, without torch.func."""
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, v))).tangent


def linear(f, x, v):
    return func.linearize(f, x)[1](v)


JVPS = {
    "jvp": lambda f, x, v: func.jvp(f, (x,), (v,))[1],
    "forward-mode": tangent_of,
    "linearize": linear,
    "jacfwd": lambda f, x, v: (func.jacfwd(f)(x) * v).sum((-3, -2, -1)),
}
TRANSFORMS = JVPS | {
    "grad": lambda f, x, v: func.grad(lambda x: f(x).sum())(x),
    "vjp": lambda f, x, v: func.vjp(f, x)[1](f(x.detach())),
    "vmap": lambda f, x, v: func.vmap(f)(x[None]),
    "hessian": lambda f, x, v: func.hessian(lambda x: f(x).sum())(x),
    "jacrev": lambda f, x, v: func.jacrev(f)(x),
    "batched-gradients": lambda f, x, v: torch.autograd.grad(
        f(y := x.detach().requires_grad_()), y, torch.randn(2, *f(x).shape, dtype=x.dtype), is_grads_batched=True
    ),
    "second-derivative": lambda f, x, v: torch.autograd.grad(
        torch.autograd.grad(f(y := x.detach().requires_grad_()).square().sum(), y, create_graph=True)[0].sum(), y
    ),
}


def tokens(B=2, L=7):
    return torch.randn(B, L, WIDTH, dtype=torch.float64)


@pytest.mark.parametrize(
    ("transform", "inner", "backbone"),
    [
        (transform, inner, backbone)
        for transform in ("jvp", "forward-mode")
        for inner in INNERS
        for backbone in BACKBONES
    ]
    + [("linearize", "linear", "mamba"), ("jacfwd", "mlp", "transformer")],
)
def test_forward_derivatives_of_a_layer(inner, backbone, transform):
    where = {"mask": MASK} if backbone == "mamba" else {}
    layer, x, v = make_layer(inner, backbone), tokens(), tokens()
    expected = slope(lambda x: layer(x, **where), x, v)
    found = JVPS[transform](lambda x: layer(x, **where), x, v)
    assert_close(found, expected, 1e-7)


@all_layers
def test_reverse_transforms_of_a_layer_are_autograds(inner, backbone):
    layer, x = make_layer(inner, backbone), tokens()
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(layer(leaf, mask=MASK).square().sum(), leaf)
    loss = lambda x: layer(x, mask=MASK).square().sum()  # noqa: E731
    assert_close(func.grad(loss)(x), expected)
    assert_close(func.jacrev(loss)(x), expected)
    v = tokens()
    hessian = func.hessian(loss)(x)
    assert_close((hessian * v).sum((-3, -2, -1)), slope(func.grad(loss), x, v), 1e-6)


@all_layers
def test_gradients_of_every_sample(inner, backbone):
    """With masks of their own, beside the sum over the batch that autograd gives."""
    layer, x = make_layer(inner, backbone), tokens()
    parameters = dict(layer.named_parameters())

    def loss(parameters, x, mask):
        return func.functional_call(layer, parameters, (x[None],), {"mask": mask[None]}).square().sum()

    by_sample = func.vmap(func.grad(loss), (None, 0, 0))({n: p.detach() for n, p in parameters.items()}, x, MASK)
    for row in range(len(x)):
        expected = torch.autograd.grad(loss(parameters, x[row], MASK[row]), list(parameters.values()))
        for name, g in zip(parameters, expected, strict=True):
            assert_close(by_sample[name][row], g, name=name)


@all_layers
def test_vmap_of_a_layer(inner, backbone):
    layer, x = make_layer(inner, backbone), tokens(6).view(3, 2, 7, WIDTH)
    masks = torch.stack((MASK, MASK.flip(0), torch.ones_like(MASK)))
    batched = func.vmap(lambda x, mask: layer(x, mask=mask))(x, masks)
    assert_close(batched, torch.stack([layer(a, mask=mask) for a, mask in zip(x, masks, strict=True)]))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("backend", ["eager", "native", "triton"])
def test_other_backends_of_a_layer_refuse(backend, backbone, transform):
    layer = make_layer("linear", backbone, width=16, backend=backend).float()
    x = torch.randn(1, 2, 16)
    with pytest.raises(RuntimeError, match=REFUSED):
        TRANSFORMS[transform](layer, x, x)
    assert layer(x).isfinite().all()


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("backend", ["eager", "native", "triton"])
def test_the_inner_loops_refuse(backend, inner, transform):
    inputs = inner_inputs(inner, B=1, L=2, H=2, D=8, K=2, dtype=torch.float32)
    q = inputs.pop("q")
    with pytest.raises(RuntimeError, match=REFUSED):
        TRANSFORMS[transform](lambda q: run_inner(inner, {"q": q, **inputs}, backend=backend)[0], q, q)


@pytest.mark.parametrize("name", ["k", "v", "inner_lr", "token_scale", "W1", "b2", "ln_weight"])
def test_forward_derivatives_of_the_inner_loop(name):
    """With respect to anything; also of the state that comes out."""
    inputs = inner_inputs("mlp", B=2, L=5, H=2, D=4, K=3)
    x, v = inputs.pop(name), None
    v = torch.randn_like(x)

    def run(x):
        o, state = run_inner("mlp", {name: x, **inputs})
        return torch.cat([y.flatten() for y in (o, *state.weights)])

    for transform in ("jvp", "forward-mode"):
        assert_close(JVPS[transform](run, x, v), slope(run, x, v), 1e-6, transform)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_losses_over_a_catalogue(reduction):
    h, table = torch.randn(5, 4).double(), torch.randn(12, 4).double()
    items = torch.randint(1, 12, (5,))

    def loss(h):
        return full_softmax.nll(h, table, items, reduction)

    v = torch.randn_like(h)
    for transform in ("jvp", "forward-mode", "linearize"):
        assert_close(JVPS[transform](loss, h, v), slope(loss, h, v), 1e-7, transform)
    by_row = func.vmap(lambda h, item: full_softmax.nll(h[None], table, item[None], reduction))(h, items)
    assert_close(by_row.flatten(), full_softmax.nll(h, table, items))
    if reduction != "none":
        leaf = h.clone().requires_grad_()
        assert_close(func.grad(loss)(h), torch.autograd.grad(loss(leaf), leaf)[0])


@pytest.mark.parametrize("name", ["full_softmax_nll", "full_softmax_total_nll"])
def test_operators_of_the_full_softmax_refuse(name):
    h, table, items = torch.randn(5, 4), torch.randn(12, 4), torch.randint(1, 12, (5,))
    for name_of, transform in TRANSFORMS.items():
        if name_of not in ("batched-gradients", "second-derivative") or name == "full_softmax_nll":
            with pytest.raises(RuntimeError, match=REFUSED):
                transform(lambda h: OPERATORS[name](FullSoftmax(h, table, items), "auto")[0], h, h)


@pytest.mark.parametrize("mixer", MIXERS)
def test_models(mixer):
    """All mixers, whole, with the loss: by parameters, forwards and one sample at a time."""
    model = TTT4Rec(TTT4RecConfig(12, 8, 1, 2, mixer, block_conv=True), dtype=torch.float64).eval()
    ids, items = torch.tensor([[1, 2, 3, 4, 5, 6]]), torch.tensor([7])
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    table = 50 * parameters.pop("embedding.weight")  # as large as the norm behind it makes it, for finite differences

    def loss(table):
        h = func.functional_call(model, {**parameters, "embedding.weight": table}, (ids,))[:, -1]
        return full_softmax.nll(h, table, items, "sum")

    v = torch.randn_like(table)
    v[0] = 0
    if mixer in ("ttt", "mamba"):  # of the others PyTorch's GRU and attention have no forward derivatives
        assert_close(JVPS["jvp"](loss, table, v), slope(loss, table, v), 1e-6)
    leaf = table.clone().requires_grad_()
    assert_close(func.grad(loss)(table), torch.autograd.grad(loss(leaf), leaf)[0])


def test_no_operator_is_left_out():
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("ttt4rec::")]
    assert len(names) == len(NAMES)
    assert OPERATORS.keys() < NAMES
    for name in names:
        assert name.removeprefix("ttt4rec::") in NAMES
        for key in ("FuncTorchDynamicLayerFrontMode", "Batched"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key), (name, key)


@pytest.mark.parametrize("transform", ["jvp", "forward-mode", "vmap", "grad"])
def test_operators_around_the_inner_loop_refuse(transform):
    """Each alone: in a layer the first of them speaks for all."""
    for operator in (CONVOLUTIONS[1], output):
        given = operator.sample()
        with pytest.raises(RuntimeError, match=REFUSED):
            TRANSFORMS[transform](lambda x: operator(type(given)(x, *given[1:]), "eager")[0], given[0], given[0])  # noqa: B023


def test_steps_refuse_and_leave_the_pool():
    layer = make_layer("linear", "mamba")
    model = TTT4Rec(TTT4RecConfig(12, 8, 1, 2, block_conv=True)).eval()
    pool, pools, slots, x = layer.make_pool(2), model.make_pools(2), torch.arange(2), tokens()[:, 0]
    before = pool.records.clone()
    for backend in ("auto", "eager", "reference"):
        layer.backend = backend
        for transform in ("jvp", "forward-mode", "vmap", "grad"):
            with pytest.raises(RuntimeError, match="a step changes its pool in place"):
                TRANSFORMS[transform](lambda x: layer.step(x, pool, slots), x, x)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="a step changes its pool in place"):
        model.step(torch.tensor([1, 2]), pools, slots)
    assert torch.equal(pool.records, before)
    assert not any(p.conv.any() or p.mixer.position.any() for p in pools)


def test_a_compiled_transform_is_right():
    torch._dynamo.reset()
    layer, x = make_layer("linear", "transformer"), tokens(1, 3)
    gradient = func.grad(lambda x: layer(x).square().sum())
    compiled = torch.compile(gradient, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), gradient(x))

"""Every kernel in Triton's interpreter against its twin and float64, and compiled for GPUs that are not here."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import tiny, train
from numerics import KERNEL, KERNEL_FLOOR, relative

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
triton = pytest.importorskip("triton")
from symlm_kernels import agreement, products, reference, rows, selection, stacks, tiles  # noqa: E402
from symlm_kernels.jit import rows as row_kernels  # noqa: E402
from symlm_kernels.jit import stacks as stack_kernels  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

import symlm  # noqa: E402
from symlm.polar import polar  # noqa: E402
from symlm.routing.describe import launches  # noqa: E402

SHAPES = [(1, 1, 1), (1, 1, 7), (5, 7, 1), (1, 63, 100), (5, 63, 100), (1, 130, 257), (1, 200, 65)]
DTYPES = [torch.float32, torch.float16]  # bf16 is wrong in the interpreter


ENDS = ("embedding", "lm_head")  # whose step is fused for fp32 weights alone


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read by Triton when it is imported: a process of its own
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter's process")
compiled_only = pytest.mark.skipif(INTERPRETED, reason="compiles: not in the interpreter's process")


@compiled_only
def test_suite_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


@pytest.fixture(autouse=True)
def nan_in_fresh_memory(monkeypatch):
    """Fill what `torch.empty` returns with NaN, so that an element that no program wrote is seen."""
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, make=make, **k: with_nan(make(*a, **k)))


def with_nan(X):
    return X.fill_(torch.nan) if X.is_floating_point() else X


def check(kernel, twin, *arguments):
    """Compare a kernel with float64, in units of the twin's own error; no argument may change."""
    before = [x.clone() if isinstance(x, torch.Tensor) else x for x in arguments]
    exact = twin(*(x.double() if isinstance(x, torch.Tensor) else x for x in arguments))
    ours, theirs = kernel(*arguments), twin(*arguments)
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    floor = KERNEL_FLOOR[str(ours.dtype).removeprefix("torch.")]
    assert relative(ours.double(), exact) <= max(KERNEL * relative(theirs.double(), exact), floor)
    for x, y in zip(arguments, before, strict=True):
        assert not isinstance(x, torch.Tensor) or torch.equal(x, y)


def random(*shape, dtype):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(3)) / shape[-1] ** 0.5).to(dtype)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_their_twins(shape, dtype):
    X = random(*shape, dtype=dtype)
    check(products.gram, reference.gram, X)
    A = reference.gram(X.float()).to(dtype)
    check(products.symmetric_product, reference.symmetric_product, A, A, A, 0.5, 2.0)
    check(products.apply_polynomial, reference.apply_polynomial, A, X, 3.0)
    assert torch.equal(products.gram(X), products.gram(X).mT)


@interpreted
@pytest.mark.parametrize(
    "view",
    [lambda X: X.mT, lambda X: X[:, ::2], lambda X: X[..., 1::2], lambda X: X.unflatten(1, (4, 16))[:, 1]],
    ids=["transposed", "every second row", "every second column", "a head"],
)
def test_any_stride_is_read_in_place(view):
    X = view(random(2, 64, 90, dtype=torch.float32))
    check(products.gram, reference.gram, X)
    A = reference.gram(X)
    check(products.apply_polynomial, reference.apply_polynomial, A.mT, X, 3.0)


@interpreted
@pytest.mark.parametrize(("shape", "strides"), [((3, 8), (2**30, 1)), ((3, 40), (1, 2**26)), ((40, 3), (2**26, 1))])
def test_addresses_beyond_32_bits(shape, strides):
    """Rows or columns far apart, as in a tensor of more than 2³¹ elements: views of one far-away storage."""
    try:
        storage = torch.UntypedStorage(4 * (40 * 2**26 + 64))
    except RuntimeError:
        pytest.skip("needs 10 GiB of address space, of which a few pages are touched")
    far = torch.tensor([]).set_(storage, 0, shape, strides)
    far.copy_(random(*shape, dtype=torch.float32))
    check(products.gram, reference.gram, far[None])
    B = random(1, shape[0], shape[0], dtype=torch.float32)
    check(products.apply_polynomial, reference.apply_polynomial, B, far[None], 3.0)


@interpreted
@pytest.mark.parametrize("name", ["row_norm_step", "centered_row_norm_step"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (63, 100), (130, 257)], ids=str)
@pytest.mark.parametrize(
    ("finite", "nesterov", "over_mean"),
    [(1.0, False, False), (1.0, True, True), (0.0, True, True), (0.0, False, False), (1.0, False, True)],
)
def test_row_steps_are_their_twins(name, shape, finite, nesterov, over_mean, monkeypatch):
    monkeypatch.setattr(rows, "PARTS", 25)  # so that a program sums several rows
    G, M, W = (torch.randn(shape, generator=torch.Generator().manual_seed(k)) for k in range(3))
    r = torch.rand(shape[0], 1, generator=torch.Generator().manual_seed(3))
    G[0], M[0], r[0] = 0, 0, 0
    G[1:2], M[1:2], r[1:2] = 0, 1e-44, 1e-43  # a mean that has decayed below the normal numbers counts as zero
    if finite == 0:
        G[-1, -1] = torch.nan
    scalars = [torch.tensor(x) for x in (0.3, 0.9, finite)]
    found = []
    for module in (rows, reference):
        own = [T.clone() for T in (G, M, W, r)]
        mean = reference.MeanNorms(own[3], torch.tensor(1 - 0.95**3), 0.95) if over_mean else None
        getattr(module, name)(*own[:3], 0.9, *scalars, nesterov, mean)
        found.append(own)
    ours, twins = found
    assert torch.equal(ours[0].nan_to_num(), G.nan_to_num())
    assert all(relative(a, b) < 1e-6 for a, b in zip(ours[1:], twins[1:], strict=True))
    assert torch.equal(ours[3], r) != (over_mean and finite == 1 and shape[0] > 1)
    if finite == 0:
        assert all(torch.equal(a, b) for a, b in zip(ours[1:], (M, W, r), strict=True))


@interpreted
@pytest.mark.parametrize("shape", [(1, 7), (63, 100)], ids=str)
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize(
    ("finite", "nesterov", "over_mean"), [(1.0, False, False), (1.0, True, True), (0.0, True, True)]
)
def test_directions_and_steps_by_them_are_their_twins(shape, centered, finite, nesterov, over_mean, monkeypatch):
    monkeypatch.setattr(rows, "PARTS", 25)
    G, M, W = (torch.randn(shape, generator=torch.Generator().manual_seed(k)) for k in range(3))
    r = torch.rand(shape[0], 1, generator=torch.Generator().manual_seed(3))
    G[0], M[0], r[0] = 0, 0, 0
    scalars = [torch.tensor(x) for x in (0.3, 0.9, finite)]
    found = []
    for module in (rows, reference):
        own = [T.clone() for T in (M, W, r)]
        mean = reference.MeanNorms(own[2], torch.tensor(1 - 0.95**3), 0.95) if over_mean else None
        D, row = module.row_directions(G, own[0], 0.9, scalars[-1], nesterov, mean, centered)
        module.step_by_directions(D, row, own[1], *scalars)
        half, _ = module.row_directions(G, M.clone(), 0.9, scalars[-1], nesterov, None, centered, torch.float16)
        found.append([*own, D, row, half])
    ours, twins = found
    if finite == 0:
        assert all(torch.equal(a, b) for a, b in zip(ours[:3], (M, W, r), strict=True))
        return
    assert all(relative(a, b) < 1e-6 for a, b in zip(ours[:4], twins[:4], strict=True))
    assert torch.allclose(ours[4], twins[4], atol=1e-6)
    assert ours[5].dtype == torch.float16
    assert torch.allclose(ours[5], twins[5], atol=1e-3)
    assert torch.equal(ours[2], r) != (over_mean and shape[0] > 1)


@interpreted
@pytest.mark.parametrize(
    ("shape", "matrices"), [((3, 40, 50), 3), ((70, 130), 1), ((8, 1024), 8), ((1, 1), 1)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("finite", "nesterov"), [(1.0, False), (1.0, True), (0.0, True)])
def test_passes_over_stacks_are_their_twins(shape, matrices, dtype, finite, nesterov):
    generator = torch.Generator().manual_seed(5)
    G = [(1e-3 * torch.randn(shape, generator=generator)).to(dtype) for _ in range(3)]
    M, sizes = [torch.randn(shape, generator=generator) for _ in G], torch.rand(3, matrices, generator=generator)
    G[0][0], M[0][0] = 0, 0  # a matrix of zeros, or a row
    M[2] = M[2] * 1e30  # whose squares overflow
    if finite == 0:
        G[1].view(-1)[-1] = torch.nan
    found = []
    for module in (stacks, reference):
        momenta, weights = ([m.clone() for m in some] for some in (M, M[1:] + G[:1]))
        weights[2] = weights[2].float()
        X = module.stack_inputs(G, momenta, 0.9, torch.tensor(finite), matrices, 1.02, nesterov, dtype)
        squares = module.stack_step(X, weights, sizes, torch.tensor(0.1), 2.0, 0.3)
        found.append([X.float(), squares.sum(), *momenta, *weights])
    for ours, twins in zip(*found, strict=True):
        assert relative(ours.double(), twins.double()) < (2e-6 if dtype == torch.float32 else 1e-3)
    assert found[0][0].isfinite().all()
    assert finite or all(torch.equal(ours, before) for ours, before in zip(found[0][2:5], M, strict=True))


@interpreted
def test_a_stack_of_different_tensors_is_refused():
    one, other = torch.zeros(4, 6), torch.zeros(6, 4).mT
    for tensors, said in (([one, other], "contiguous"), ([one, one.double()], "one dtype"), ([one], "a list of 1")):
        with pytest.raises(ValueError, match=said):
            stacks.stack_step(torch.zeros(2, 4, 6), tensors, torch.ones(2, 1), torch.ones(()), 1.0, 0.0)


@interpreted
@pytest.mark.parametrize("kind", ["qwen3", "olmoe"])
@pytest.mark.parametrize(
    "told",
    [{}, {"nesterov": False, "weight_decay": 0.1}, {"momentum_dtype": "bfloat16"}, {"gram_every": 2}],
    ids=str,
)
def test_the_optimizer_does_its_polar_factors_in_passes(kind, told):
    models = [tiny(kind, num_hidden_layers=1), tiny(kind, num_hidden_layers=1)]
    sizes = []
    for model, kernels in zip(models, ("triton", "torch"), strict=True):
        optimizer = symlm.SymOptimizer(model, kernels=kernels, compute_dtype="float32", **told)
        train(model, optimizer, 2)
        sizes.append(symlm.diagnostics.update_rms(optimizer))
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        # The inverse root of a Gram matrix of few steps amplifies rounding.
        bound = 1e-2 if "momentum_dtype" in told else 1e-4 if "gram_every" in told else 1e-5
        assert relative(p, q) < bound, name
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-2)


@interpreted
@pytest.mark.parametrize(
    ("trained", "overrides"),
    [
        ("", {}),
        ("q_proj|embed", {"attention_q": {"nesterov": False}}),
        ("lm_head", {"lm_head": {"rule": "centered_row_norm"}}),
    ],
)
def test_launches_and_bytes_are_those_that_kernels_were_given(trained, overrides, monkeypatch):
    """Numbers by row, by matrix and by part are not counted: of rows of 32 they are up to four in a hundred."""
    from traffic import Traffic

    monkeypatch.setattr(rows, "PARTS", 1)
    model = tiny(num_hidden_layers=1)
    for name, p in model.named_parameters():
        p.requires_grad_(bool(re.search(trained, name)))
    optimizer = symlm.SymOptimizer(model, kernels="triton", overrides=overrides)
    train(model, optimizer, 1)
    with Traffic(monkeypatch) as found:
        optimizer.step()
    routed = [
        row for row in symlm.describe_routing(model, kernels="triton", overrides=overrides) if row.rule != "adamw"
    ]
    roles = {row.role for row in routed}
    said = sum(launches([row for row in routed if row.role == role]) for role in roles)
    assert found.launches.total() == said, found.launches
    assert found.passes == pytest.approx(sum(row.moved.passes for row in routed), rel=0.04)
    assert found.operands == pytest.approx(sum(row.moved.operands for row in routed), rel=0.04)


@interpreted
@pytest.mark.parametrize("method", ["newton_schulz", "gram_newton_schulz"])
@pytest.mark.parametrize("shape", [(2, 63, 100), (1, 100, 63)], ids=str)
def test_polar_from_the_kernels_is_polar_from_torch(method, shape):
    M = random(*shape, dtype=torch.float32)
    exact = polar(M.double(), method, kernels="torch")
    ours, theirs = (relative(polar(M, method, kernels=kernels).double(), exact) for kernels in ("triton", "torch"))
    assert ours < KERNEL * theirs


@interpreted
@pytest.mark.parametrize(
    ("overrides", "passes"),
    [
        ({}, ["row_norm_step", "row_directions"]),
        ({"lm_head": {"rule": "whitened_row_adam", "compute_dtype": "float64"}}, ["row_norm_step", "row_directions"]),
        ({"lm_head": {"rule": "centered_row_adam"}}, ["row_norm_step", "centered_row_norm_step"]),
        (
            {"lm_head": {"rule": "centered_row_norm"}, "embedding": {"rule": "row_norm"}},
            ["row_norm_step", "centered_row_norm_step"],
        ),
    ],
    ids=["default", "whitened", "adam", "norm"],
)
def test_the_optimizer_does_its_rows_fused(overrides, passes, monkeypatch):
    called = []
    for name in ("row_norm_step", "centered_row_norm_step", "row_directions"):
        step = getattr(rows, name)
        monkeypatch.setattr(rows, name, lambda *told, name=name, step=step: (called.append(name), step(*told))[1])
    models = [tiny(num_hidden_layers=1), tiny(num_hidden_layers=1)]
    for model, kernels in zip(models, ("triton", "torch"), strict=True):
        vectors = {"vector": {"weight_decay": 0.0}}
        optimizer = symlm.SymOptimizer(
            model, kernels=kernels, weight_decay=0.1, steps=2, overrides={**overrides, **vectors}
        )
        train(model, optimizer, 3)
    assert sorted(called) == sorted(3 * passes)
    told = symlm.describe_routing(models[0], kernels="triton", overrides=overrides)
    assert all(row.products == "triton, fused" for row in told if row.rule != "adamw")
    told = symlm.describe_routing(tiny().bfloat16(), kernels="triton", overrides=overrides)
    assert all((row.products == "triton, fused") == (row.role not in ENDS) for row in told if row.rule != "adamw")
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert relative(p, q) < 1e-5, name


@compiled_only
def test_triton_asked_for_in_vain_says_why():
    with pytest.raises(RuntimeError, match="asked for, but the stack is on cpu; use kernels='auto'"):
        polar(torch.randn(4, 4), kernels="triton")
    with pytest.raises(ValueError, match="unknown kernels 'cuda'"):
        polar(torch.randn(4, 4), kernels="cuda")


def test_rows_too_long_are_refused():
    G = torch.zeros(1, rows.LARGEST_ROW + 1)
    with pytest.raises(ValueError, match="rows of 8193 are longer"):
        rows.row_norm_step(G, G, G, 0.9, *(torch.ones(()) for _ in range(3)))


SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
EVERY_GPU = pytest.mark.parametrize(
    "arch", [pytest.param(arch, marks=[pytest.mark.slow] * (arch != 90)) for arch in SHARED]
)
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


UNIT = ("x_k", "y_k", "x_n", "b_k", "c_n", "d_n")
FLIPPED = ("x_m", "y_m", "b_k", "c_n", "d_n")


def compile_for(arch, kernel, pointers, constants, warps=4, stages=2, unit=UNIT, aligned=True):
    """Compile a kernel as its launcher would specialize it: aligned pointers, unit strides, sizes aligned or not."""
    signature, constexprs, attributes = {}, {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants or name in unit:
            signature[name], constexprs[(position,)] = "constexpr", constants.get(name, 1)
        elif name.endswith("_ptr"):
            signature[name] = pointers[name]
        else:
            signature[name] = "fp32" if name in ("alpha", "beta", "beta2", "a", "bound", "scale", "decay") else "i32"
        if name.endswith("_ptr") or (aligned and signature[name] == "i32"):
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs, attributes)
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


SPILLED = {80: 16, 90: 16, 100: 96}  # bytes a thread; sm_100 has no record yet, and its widest tile spills


def spills(compiled, tmp_path):
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    out = subprocess.run([tool, "--dump-resource-usage", binary], capture_output=True, text=True, check=True).stdout
    (usage,) = [line for line in out.splitlines() if "REG:" in line]
    return max(int(usage.split(f"{kind}:")[1].split()[0]) for kind in ("LOCAL", "STACK"))  # spills are on the stack


LAYOUTS = {"rows": (UNIT, True), "columns": (FLIPPED, True), "odd rows": (UNIT, False), "any stride": ((), False)}


@compiled_only
@pytest.mark.parametrize(
    ("dtype", "layout"),
    [(torch.float16, "rows")] + [(dtype, name) for dtype in (torch.float32, torch.bfloat16) for name in LAYOUTS],
    ids=str,
)
@EVERY_GPU
def test_every_tile_of_the_products_fits_every_gpu(arch, dtype, layout, tmp_path):
    element, (unit, aligned) = torch.empty(0, dtype=dtype).element_size(), LAYOUTS[layout]
    pointers = dict.fromkeys(("x_ptr", "y_ptr", "c_ptr", "d_ptr", "b_ptr"), POINTERS[dtype])
    for name in ("gram", "symmetric_product", "apply_polynomial"):
        kernel = products._apply_kernel if name == "apply_polynomial" else products._symmetric_kernel
        for tile in {tiles.choose_tile(name, side, side, element, aligned) for side in (64, 1024)}:
            sides = {"BLOCK": tile.m, "BLOCK_M": tile.m, "BLOCK_N": tile.n, "HAS_C": name == "symmetric_product"}
            constants = {**sides, "BLOCK_K": tile.k, "PRECISION": "ieee" if element == 4 else "tf32"}
            constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
            compiled = compile_for(arch, kernel, pointers, constants, tile.warps, tile.stages, unit, aligned)
            assert compiled.metadata.shared <= SHARED[arch]
            assert spills(compiled, tmp_path) <= SPILLED[arch], (name, tile)
            ptx = compiled.asm["ptx"]
            assert element == 4 or any(word in ptx for word in ("wgmma", "mma.sync", "tcgen05.mma"))
            assert element == 4 or arch != 90 or "wgmma" in ptx
            assert not aligned or "st.global.v4" in ptx, (name, tile)


ROW_KERNELS = tuple(
    getattr(row_kernels, f"{name}_kernel") for name in ("row", "momentum", "direction", "centered_apply", "step")
)


@compiled_only
@EVERY_GPU
@pytest.mark.parametrize("columns", [16, 1024, 4096, rows.LARGEST_ROW])
def test_row_steps_compile_for_every_gpu(arch, columns, tmp_path):
    names = {name for kernel in ROW_KERNELS for name in kernel.arg_names if name.endswith("_ptr")}
    for kernel, flag in ((kernel, flag) for kernel in ROW_KERNELS for flag in (False, True)):
        constants = {"BLOCK": columns, "MEAN": flag, "NESTEROV": flag, "WRITE": flag}
        constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
        told = (dict.fromkeys(names, "*fp32"), constants, tiles.row_warps(columns))
        compiled = compile_for(arch, kernel, *told)
        assert spills(compiled, tmp_path) == 0
        assert columns < 1024 or "st.global.v4" in compiled.asm["ptx"]


@compiled_only
@EVERY_GPU
@pytest.mark.parametrize("dtype", list(POINTERS), ids=str)
def test_passes_over_stacks_compile_for_every_gpu(arch, dtype, tmp_path):
    """Every entry is read and written sixteen bytes at a time, though its address comes from a table."""
    kind = getattr(triton.language, str(dtype).removeprefix("torch."))
    types = {"G_TYPE": kind, "M_TYPE": triton.language.float32, "W_TYPE": triton.language.float32}
    for name in ("momentum", "norm", "input", "step"):
        kernel = getattr(stack_kernels, f"{name}_kernel")
        constants = {**types, "NESTEROV": True, "ALIGN": 16, "PART": stacks.PART, "BLOCK": 1024}
        constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
        pointers = {name: "*fp32" for name in kernel.arg_names if name.endswith("_ptr")}
        pointers |= {name: "*i64" for name in pointers if name.endswith("_table_ptr")}
        pointers |= dict.fromkeys(("x_ptr", "u_ptr"), POINTERS[dtype])
        compiled = compile_for(arch, kernel, pointers, constants, stacks.WARPS)
        assert spills(compiled, tmp_path) == 0
        assert name == "norm" or "global.v4" in compiled.asm["ptx"]


@compiled_only
@pytest.mark.parametrize("name", ["row", "direction", "centered_apply"])
def test_a_mean_norm_is_read_by_all_threads_before_one_of_them_stores_it(name):
    """Else a late warp divides by a norm that was refreshed already: a barrier lies between."""
    kernel = getattr(row_kernels, f"{name}_kernel")
    constants = {"BLOCK": 1024, "MEAN": True, "NESTEROV": True, "WRITE": True}
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    pointers = {name: "*fp32" for name in kernel.arg_names if name.endswith("_ptr")}
    ptx = compile_for(90, kernel, pointers, constants, tiles.row_warps(1024)).asm["ptx"]
    stored = re.findall(r"st\.global\.b32 \[ ?(%rd\d+)", ptx)
    (norm,) = [place for place in stored if re.search(rf"ld\.global\.b32 \{{? ?%r\d+ ?\}}?, \[ ?{place}\b", ptx)]
    read, written = (re.search(rf"{kind}\.global\.b32 [^;]*\[ ?{norm}\b", ptx) for kind in ("ld", "st"))
    assert "bar.sync" in ptx[read.end() : written.start()]


def test_a_large_tile_is_only_for_what_is_read_sixteen_bytes_at_a_time():
    """Where each element has an address of its own, a large tile spills."""
    X = torch.empty(2, 512, 1024, dtype=torch.float16)
    assert products._aligned(X, X.mT, X[:, 16:], X[..., :512])
    odd = (X[..., :1023], X[..., 1:1009], X[:, 1:, 1:], X[..., ::2], X.view(2, 1024, 512)[:, :513].mT)
    assert not any(products._aligned(X, view) for view in odd)
    for name in ("gram", "symmetric_product", "apply_polynomial"):
        assert tiles.choose_tile(name, 2048, 2048, 2, aligned=False) == tiles.ANY_STRIDE != tiles.GRAM


@interpreted
@pytest.mark.parametrize("what", ["products", "rows", "stacks"])
def test_kernels_that_are_wrong_here_are_seen(what, monkeypatch):
    """A kernel that is wrong on a machine, or does not compile there, is named in a warning."""
    wrong = {"products": (products, "gram"), "rows": (rows, "row_norm_step"), "stacks": (stacks, "stack_step")}
    module, name = wrong[what]
    kernel = getattr(module, name)
    agrees = agreement.agrees.__wrapped__  # which remembers nothing
    assert agrees(what, "cpu")
    monkeypatch.setattr(module, name, lambda *a, **k: 1.5 * kernel(*a, **k))
    with pytest.warns(UserWarning, match=f"kernels of {what} differ from torch by"):
        assert not agrees(what, "cpu")
    monkeypatch.setattr(module, name, lambda *a, **k: 1 / 0)
    with pytest.warns(UserWarning, match="fail: ZeroDivisionError"):
        assert not agrees(what, "cpu")


def test_auto_takes_kernels_that_are_faster_and_agree(monkeypatch):
    for what, least in selection.FASTER_FROM.items():
        for agreed in (True, False):
            monkeypatch.setattr(selection, "agrees_here", lambda _, agreed=agreed: agreed)
            for side in (least or 8192, (least or 2) - 1):
                chosen = selection.choose("cuda", torch.float32, side, what=what)
                assert (chosen == "triton") == (agreed and least is not None and side >= least)
        assert selection.choose("cpu", torch.float32, 8192, what=what) == "torch"

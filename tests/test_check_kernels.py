"""The logic of scripts/check_kernels.py on invented code; on the real one it runs as `make check-kernels`."""

import subprocess
import sys
from pathlib import Path

import check_kernels
import pytest
from check_kernels import Code, check_code, check_log, read_kernels, read_ptxas, read_resources, read_sass

ROOT = Path(__file__).resolve().parent.parent

SOURCE = """
// A comment about something else.
// SASS: tensor cores
struct Config {};

// The product of two matrices.
// SASS: tensor cores, 16-byte loads
// More about it.
template <typename T, int Width>
__global__ void __launch_bounds__(Config::kThreads, (2)) product_kernel(Params p) {
}

// In a comment __global__ means nothing.
__global__ void small_kernel(const int* x) {}

// SASS: 16-byte loads, stack 64 (a table of pointers, read once)
static __global__ void table_kernel(
    Params p) {}
"""


def read(tmp_path, text):
    (tmp_path / "op.cu").write_text(text)
    return read_kernels([tmp_path / "op.cu"], tmp_path)


def test_kernels_and_their_marks(tmp_path):
    kernels = read(tmp_path, SOURCE)
    assert [(k.name, k.place, k.marks) for k in kernels] == [
        ("product_kernel", "op.cu:10", {"tensor cores", "16-byte loads"}),
        ("small_kernel", "op.cu:14", set()),
        ("table_kernel", "op.cu:17", {"16-byte loads", "stack N"}),
    ]
    assert [kernel.stack for kernel in kernels] == [0, 0, 64]
    with pytest.raises(ValueError, match="op.cu:2: SASS: tensor core means nothing"):
        read(tmp_path, "// SASS: tensor core\n__global__ void f() {}\n")
    with pytest.raises(ValueError, match="op.cu:1: a __global__ function that this script does not understand"):
        read(tmp_path, "__global__ auto f() -> void {}\n")


def test_every_kernel_of_this_repository_is_understood():
    cuda = ROOT / "csrc" / "cuda"
    files = [path for suffix in ("cu", "cuh", "h") for path in cuda.rglob(f"*.{suffix}")]
    places = {kernel.place.split(":")[0] for kernel in read_kernels(files, ROOT)}
    assert {"csrc/cuda/rms_norm.cu", "csrc/cuda/moe_router.cu"} <= places


def symbol(kernel: str, arguments: str = "") -> str:
    return f"_ZN4kimi4cuda45_GLOBAL__N__43fd58f3_12_op_cu_43078a60{len(kernel)}{kernel}{f'I{arguments}E' if arguments else ''}EvNS_6ParamsE"


WIDE, MATRIX, PLAIN = ["LDG.E.128.CONSTANT"], ["HMMA.16816.F32.BF16"], ["LDG.E", "FFMA", "STG.E.128"]


def product(arguments: str, opcodes: list[str], **more) -> Code:
    return Code(symbol("product_kernel", arguments), 40, opcodes=opcodes, **more)


GOOD = [
    product("13__nv_bfloat16Li8E", WIDE + MATRIX),
    product("13__nv_bfloat16Li1E", MATRIX),
    product("6__halfLi8E", WIDE + MATRIX),
    product("fLi4E", WIDE + PLAIN),
]


@pytest.mark.parametrize(
    "codes, error",
    [
        (GOOD, None),
        (GOOD[1:], "no instantiation for bf16 elements has 16-byte loads"),
        (GOOD[:3] + [product("fLi4E", PLAIN)], "no instantiation for other elements has 16-byte loads"),
        (GOOD[1:] + [product("13__nv_bfloat16Li8E", WIDE)], "no tensor-core instruction in _ZN4kimi4cuda45"),
        (GOOD + [product("fLi1E", [], stack=16)], "16 bytes of stack, 0 bytes spilled, 0 local accesses in _ZN"),
        (GOOD + [product("fLi1E", ["STL.64", "LDL"])], "0 bytes of stack, 0 bytes spilled, 2 local accesses in _ZN"),
        ([], "not in the build"),
    ],
)
def test_what_a_kernel_must_have(tmp_path, codes, error):
    kernels = [kernel for kernel in read(tmp_path, SOURCE) if kernel.name == "product_kernel"]
    errors = check_code(kernels, codes, instructions=True)
    assert errors == [] if error is None else len(errors) == 1 and errors[0].startswith("op.cu:10: product_kernel: " + error)


def test_what_an_unmarked_kernel_may_have(tmp_path):
    _, small, table = read(tmp_path, SOURCE)
    assert check_code([small], [Code(symbol("small_kernel"), 20, opcodes=PLAIN)], instructions=True) == []
    errors = check_code([small], [Code(symbol("small_kernel"), 20, opcodes=WIDE + MATRIX)], instructions=True)
    assert ["// SASS: tensor cores" in errors[0], "// SASS: 16-byte loads" in errors[1]] == [True, True]
    assert check_code([small], [Code(symbol("small_kernel"), 20, opcodes=WIDE)], instructions=False) == []
    assert check_code([table], [Code(symbol("table_kernel"), 20, 64, opcodes=["LDL", *WIDE])], instructions=True) == []
    errors = check_code([table], [Code(symbol("table_kernel"), 20, 72, opcodes=["LDL", *WIDE])], instructions=True)
    assert len(errors) == 1 and "72 bytes of stack" in errors[0]


def test_names_that_contain_each_other(tmp_path):
    kernels = read(tmp_path, "__global__ void norm_kernel() {}\n__global__ void rms_norm_kernel() {}\n")
    owners = [[k.name for k in kernels if k.owns(symbol(name))] for name in ("norm_kernel", "rms_norm_kernel")]
    assert owners == [["norm_kernel"], ["rms_norm_kernel"]]


def test_reading_the_tools():
    resources = f"Resource usage:\n Common:\n  GLOBAL:0\n Function {symbol('f')}:\n  REG:40 STACK:8 SHARED:1024 LOCAL:0 CONSTANT[0]:608\n"
    assert read_resources(resources) == {symbol("f"): Code(symbol("f"), 40, 8)}
    sass = """
		Function : f
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                                /* 0x00000a00ff017b82 */
                                                                                         /* 0x000fe20000000800 */
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;             /* 0x00000a00ff017b82 */
        /*1020*/              @UP1 UMOV UR4, URZ ;                                       /* 0x0000003f00047c82 */
		Function : g
        /*0000*/                   EXIT ;                                                /* 0x000000000000794d */
"""
    assert read_sass(sass) == {"f": ["LDC", "LDG.E.128.CONSTANT", "UMOV"], "g": ["EXIT"]}
    ptxas = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'f' for 'sm_80'
ptxas info    : Function properties for f
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 608 bytes cmem[0]
ptxas info    : Compiling entry function 'g' for 'sm_80'
ptxas info    : Function properties for g
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 20 registers
"""
    assert read_ptxas(ptxas) == {"f": Code("f", 255, 16, 20), "g": Code("g", 20)}


@pytest.mark.parametrize(
    "opcodes, tensor_cores, wide_loads",
    [
        (["HGMMA.64x256x16.F32.BF16", "UTMALDG.2D"], 1, 1),
        (["HMMA.1688.F32.TF32", "LDGSTS.E.BYPASS.128.CONSTANT"], 1, 1),
        (["LDG.E.64", "STG.E.128", "LDS.128", "FFMA", "MOVM.16.MT88"], 0, 0),
        (["UBLKCP.S.G", "LD.E.128"], 0, 2),
    ],
)
def test_instructions(opcodes, tensor_cores, wide_loads):
    code = Code("f", opcodes=opcodes)
    assert (code.tensor_cores, code.wide_loads) == (tensor_cores, wide_loads)


def test_warnings_of_the_assembler():
    assert check_log("op", "ptxas info    : 11 bytes gmem\nnvcc: some remark\n") == []
    serialised = (
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ... in the function 'f'"
    )
    spilled = "ptxas warning : Registers are spilled to local memory in function 'f', 16 bytes spill stores, 16 bytes spill loads"
    other = "ptxas warning : something else"
    assert check_log("op", f"{serialised}\n{spilled}\n  {other}\n") == [f"op: {serialised}", f"op: {other}"]


def test_a_build_without_kernels(tmp_path):
    command = [sys.executable, check_kernels.__file__, "--build-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"check_kernels: no CUDA kernels in {tmp_path}\n")

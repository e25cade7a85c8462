"""Compiles Triton kernels for GPUs that are not here and reads what they need from the binary."""

import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TRITON_MINOR = ".".join(triton.__version__.split(".")[:2])
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_REGISTER = re.compile(r"\bR(\d+)\b")
_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_BRANCH = re.compile(r"\bBRA\b.*\((\.L_x_\d+)\)")
_WIDE_LOAD = re.compile(r"\bLDG\.E\S*\.128\b")
# The end of the name of what is for devices with little shared memory, sm_89 among them.
SMALL_NAME = "-small"
SMALL_SM = 89
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True, slots=True)
class Variant:
    """One specialisation that a launcher ships.

    Attributes:
        kernel: the @triton.jit function.
        name: of the specialisation, unique for the kernel.
        arguments: an example call without constexprs: "*bf16" for a pointer as torch allocates
            it (aligned), an int for a size or stride.
        constexprs: meta-parameters by name.
        options: num_warps and the like, as the launcher gives them.
        min_wide_loads: 128-bit global loads that the binary must have.
        instructions: mnemonics that the binary must have, such as "HGMMA".
    """

    kernel: Any
    name: str
    arguments: dict[str, str | int]
    constexprs: dict[str, Any]
    options: dict[str, Any]
    min_wide_loads: int = 0
    instructions: tuple[str, ...] = field(default=())

    @property
    def kernel_name(self) -> str:
        return str(self.kernel.__name__)


def small(variant: Variant) -> Variant:
    """The same for a device with little shared memory."""
    return replace(variant, name=variant.name + SMALL_NAME)


def weight_arguments(dtype: str) -> tuple[str, dict[str, str], dict[str, Any]]:
    """A weight of decode in "bf16", "fp16", "fp32" or "fp8", the last beside bf16 activations.

    Returns:
        The activations' dtype, the weight's pointers, and those that are None.
    """
    if dtype == "fp8":
        return "bf16", {"w_ptr": "*fp8e4nv", "scales_ptr": "*fp32"}, {}
    return dtype, {"w_ptr": f"*{dtype}"}, {"scales_ptr": None}


@dataclass(frozen=True, slots=True)
class Resources:
    """What a compiled kernel needs; the fields of the committed table."""

    registers: int  # a thread
    stack_bytes: int  # a thread: spilled registers and local arrays
    shared_bytes: int  # a block
    wide_loads: int  # 128-bit global load instructions
    spill_instructions: int  # loads and stores of local memory
    # Of a kernel that waits for the one before it, programmatically: what it asks for before.
    early_wide_loads: int | None = None
    early_bytes: int | None = None  # by them, of all blocks that an SM holds at a time

    def as_dict(self) -> dict[str, int]:
        return {name: value for name, value in asdict(self).items() if value is not None}


def compile_variant(variant: Variant, sm: int) -> tuple[Resources, str]:
    """Compiles for compute capability sm (90 is sm_90).

    Returns:
        The resources and the disassembly.
    """
    target = GPUTarget("cuda", sm, 32)
    compiled = triton.compile(_source(variant), target=target, options=variant.options)
    with tempfile.TemporaryDirectory() as directory:
        cubin = Path(directory) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _tool("cuobjdump", "--dump-resource-usage", str(cubin))
        sass = _tool("nvdisasm", "-c", str(cubin))
    match = _USAGE.search(usage)
    assert match is not None, f"cuobjdump reports no resources:\n{usage}"
    registers, stack, static_shared, local = map(int, match.groups())
    shared = static_shared + compiled.metadata.shared
    early, threads = None, 32 * compiled.metadata.num_warps
    if "ACQBULK" in sass:
        early = len(_WIDE_LOAD.findall(sass[: sass.index("ACQBULK")]))
    resources = Resources(
        registers=registers,
        stack_bytes=stack + local,
        shared_bytes=shared,
        wide_loads=len(_WIDE_LOAD.findall(sass)),
        spill_instructions=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        early_wide_loads=early,
        early_bytes=early and 16 * early * threads * blocks_an_sm(registers, shared, threads),
    )
    return resources, sass


def blocks_an_sm(registers: int, shared_bytes: int, threads: int) -> int:
    """How many blocks an SM of sm_90 or sm_100 holds: 65536 registers, 227 KB, 2048 threads.

    A warp's registers are given out 256 at a time, and a block takes 1 KB of shared memory more.
    """
    of_a_block = -(-32 * registers // 256) * 256 * threads // 32
    return min(65536 // of_a_block, 232_448 // (shared_bytes + 1024), 2048 // threads, 32)


def early_weight_reads(sass: str) -> list[str]:
    """Instructions of a loop that wait for the weights of its next turn before its first product.

    Weights are what is loaded "evict first"; a product is an HMMA.
    """
    lines = [re.sub(r"/\*.*?\*/", "", line).strip() for line in sass.splitlines()]
    labels = {match[1]: at for at, line in enumerate(lines) if (match := _LABEL.match(line))}
    found = []
    for last, line in enumerate(lines):
        branch = _BRANCH.search(line)
        body = lines[labels.get(branch[1], last) : last] if branch else []
        products = [at for at, one in enumerate(body) if "HMMA" in one]
        pending: set[int] = set()
        for one in body[: products[0]] if products else []:
            target, _, operands = one.partition(",")
            registers = {int(number) for number in _REGISTER.findall(operands)}
            if re.search(r"\bLDG\S*\.EF\b", one):
                first, width = int(_REGISTER.findall(target)[-1]), 4 if ".128" in target else 1
                pending |= set(range(first, first + width))
            elif pending & registers:
                found.append(one)
    return found


def _source(variant: Variant) -> ASTSource:
    """Specialises as a launch does: an int of 1 is a constant, a multiple of 16 says so."""
    names = variant.kernel.arg_names
    signature: dict[str, str] = {}
    constants = dict(variant.constexprs)
    attributes: dict[tuple[int, ...], list[list[object]]] = {}
    for position, name in enumerate(names):
        value = variant.arguments.get(name)
        if name in constants or value == 1:
            signature[name] = "constexpr"
            constants.setdefault(name, 1)
        elif isinstance(value, str):
            signature[name] = value
        else:
            assert value is not None, f"{variant.name} gives no {name}"
            signature[name] = "i32"
        if isinstance(value, str) or (isinstance(value, int) and value % 16 == 0):
            attributes[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(variant.kernel, signature, constants, attributes)


def _tool(name: str, *arguments: str) -> str:
    command = [str(_TOOLS / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout

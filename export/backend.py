"""What a runtime was asked to run on, and what it says that it runs on: a silent fallback shows where the two
differ."""

from dataclasses import dataclass
from pathlib import Path

Fact = int | str | list[str]

# llama.cpp's names of instruction sets, and what the kernel calls them: the flags that must all be there.
X86 = {
    "SSE3": ("pni",),
    "SSSE3": ("ssse3",),
    "AVX": ("avx",),
    "AVX2": ("avx2",),
    "F16C": ("f16c",),
    "FMA": ("fma",),
    "BMI2": ("bmi2",),
    "AVX_VNNI": ("avx_vnni",),
    "AVX512": ("avx512f", "avx512cd", "avx512vl", "avx512dq", "avx512bw"),
    "AVX512_VBMI": ("avx512vbmi",),
    "AVX512_VNNI": ("avx512_vnni",),
    "AVX512_BF16": ("avx512_bf16",),
    "AMX_INT8": ("amx_int8",),
}
ARM = {
    "NEON": ("asimd",),
    "DOTPROD": ("asimddp",),
    "FP16_VA": ("asimdhp",),
    "MATMUL_INT8": ("i8mm",),
    "SVE": ("sve",),
    "SME": ("sme",),
}


@dataclass(frozen=True)
class Backend:
    """A runtime's surroundings.

    Attributes:
        requested: what was asked for, by name.
        effective: what is in use, in the runtime's own words; more names than were asked for are allowed.
    """

    requested: dict[str, Fact]
    effective: dict[str, Fact]

    def fallbacks(self) -> list[str]:
        """What was asked for and is not in use: "threads: 4 asked for, 2 in use". A list falls short by what
        it lacks; a name that the runtime says nothing about is no fallback."""
        found = []
        for name, asked in self.requested.items():
            used = self.effective.get(name)
            if used is None or used == asked:
                continue
            if isinstance(asked, list) and isinstance(used, list):
                lacking = [part for part in asked if part not in used]
                if lacking:
                    found.append(f"{name.replace('_', ' ')}: {', '.join(lacking)} not in use")
            else:
                found.append(f"{name.replace('_', ' ')}: {asked} asked for, {used} in use")
        return found

    def as_dictionary(self) -> dict[str, dict[str, Fact] | list[str]]:
        """``{requested, effective, fallbacks}``, as ``report.json`` has it."""
        return {"requested": self.requested, "effective": self.effective, "fallbacks": self.fallbacks()}


def instruction_sets_of_processor(information: Path = Path("/proc/cpuinfo")) -> list[str]:
    """Instruction sets of this machine's processor that llama.cpp has code for, by llama.cpp's names; empty
    where the kernel does not list them."""
    try:
        lines = information.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            known = X86 if key.strip() == "flags" else ARM
            flags = set(value.split())
            return [name for name, needed in known.items() if flags.issuperset(needed)]
    return []

"""No AVX instruction outside the functions of namespaces avx2 and avx512: one that leaks through a template ends in SIGILL."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from swiftk.kernels._native import native

FUNCTION = re.compile(r"^[0-9a-f]+ <(.*)>:$")
VEX = re.compile(r"\tv[a-z]+[0-9a-z]*\s")  # every VEX or EVEX mnemonic starts with v; `verr` and `verw` are not emitted


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed")
def test_wide_code_stays_in_its_namespace():
    command = ["objdump", "-dC", "--no-show-raw-insn", native().__file__]
    if "emulated" in (symbols := subprocess.run(["nm", "-C", native().__file__], capture_output=True, text=True).stdout):
        pytest.skip("this build emulates AVX-512 and is compiled with -mavx2 throughout")
    assert symbols, "nm shows no symbols"
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    function, wide, inside = "", set(), 0
    for line in text.splitlines():
        if match := FUNCTION.match(line):
            function = match[1]
        elif VEX.search(line):
            if "swiftk::avx2::" in function or "swiftk::avx512::" in function:
                inside += 1
            else:
                wide.add(function)
    assert inside > 1000, "objdump shows no vector code at all"
    assert not wide, sorted(wide)

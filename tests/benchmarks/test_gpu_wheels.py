"""Packages carried to a machine without a network."""

import subprocess
import sys
import zipfile

import pytest

from benchmarks.gpu.command import main
from benchmarks.gpu.wheels import COMPILED, ROOTS, install


def wheel(folder, name, tag="py3-none-any", needs=()):
    """A wheel of one module."""
    file = folder / f"{name}-1.0-{tag}.whl"
    info = f"{name}-1.0.dist-info"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.0", *(f"Requires-Dist: {need}" for need in needs)]
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"{name}.py", "NAME = __name__\n")
        archive.writestr(f"{info}/METADATA", "\n".join(lines) + "\n")
        archive.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        archive.writestr(f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    return file


def test_only_what_is_missing_and_fits_this_python_is_used(tmp_path):
    folder, target = tmp_path / "wheels", tmp_path / "site-packages"
    folder.mkdir()
    wheel(folder, "carried_package", needs=["torch", "a_package_that_is_not_there"])
    wheel(folder, "torch")  # installed
    wheel(folder, "other_version", tag="cp27-none-any")
    assert install(folder, target) == ["carried-package"]
    code = "import carried_package, torch; print(carried_package.NAME, hasattr(torch, 'Tensor'))"
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(target)}, capture_output=True, text=True)
    assert done.stdout.split() == ["carried_package", "True"], done.stderr


def test_a_folder_without_wheels_for_this_python_is_refused(tmp_path):
    wheel(tmp_path, "other_version", tag="cp27-none-any")
    with pytest.raises(SystemExit, match=r"must hold wheels for Python 3\.\d+; got none"):
        install(tmp_path, tmp_path / "target")


def test_without_a_package_index_gather_says_plainly_what_it_lacks(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_CONSTRAINT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit, match=r"pip could not download packages: .*needs a package index"):
        main(["gather", str(tmp_path / "wheels")])


def test_what_the_carried_packages_need_is_gathered_at_the_versions_that_they_name(tmp_path, monkeypatch):
    index = tmp_path / "index"
    index.mkdir()
    for name in ROOTS:
        if name != "datasets":
            wheel(index, name.replace("-", "_"))
    wheel(index, "datasets", needs=["dill<2", "pyarrow", "multiprocess; extra == 'tests'"])
    wheel(index, "dill", needs=["typing-extensions"])
    wheel(index, "typing_extensions")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.delenv("PIP_CONSTRAINT", raising=False)
    monkeypatch.setattr("benchmarks.gpu.command.CONSTRAINTS", tmp_path / "constraints.txt")
    (tmp_path / "constraints.txt").write_text("trl==1.0\n")
    main(["gather", str(tmp_path / "wheels")])
    names = {file.name.split("-")[0] for file in (tmp_path / "wheels").iterdir()}
    # Neither what is compiled nor what only an extra needs.
    assert names == {file.name.split("-")[0] for file in index.iterdir()}
    assert {"dill", "typing_extensions"} < names
    for name in COMPILED:
        wheel(index, name)
    main(["gather", str(tmp_path / "all"), "--all"])
    assert {file.name.split("-")[0] for file in (tmp_path / "all").iterdir()} == names | {*COMPILED}

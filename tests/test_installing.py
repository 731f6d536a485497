"""A package with needs of its own is installed from a folder of wheels, by the real pip, and nothing that is in use is replaced."""

from __future__ import annotations

import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from sd3tune import installing
from sd3tune.errors import ConfigError


def write_wheel(folder: Path, name: str, version: str, *requires: str) -> None:
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {row}" for row in requires)]
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", f"VERSION = {version!r}\n")
        wheel.writestr(f"{name}-{version}.dist-info/METADATA", "\n".join(lines) + "\n")
        wheel.writestr(
            f"{name}-{version}.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{name}-{version}.dist-info/RECORD", "")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip installs into, with a package that needs things; the index is a folder of wheels."""
    site, wheels = tmp_path / "site", tmp_path / "wheels"
    about = site / "needy-1.0.dist-info"
    about.mkdir(parents=True)
    wheels.mkdir()
    (about / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: needy\nVersion: 1.0\nProvides-Extra: more\nProvides-Extra: all\n"
        "Requires-Dist: needy-plain>=1\nRequires-Dist: numpy>=1\nRequires-Dist: needy-more>=2; extra == 'more'\n"
        "Requires-Dist: needy[more]; extra == 'all'\nRequires-Dist: needy-never; python_version < '3'\n"
    )
    write_wheel(wheels, "needy_plain", "1.5")
    write_wheel(wheels, "needy_more", "2.1")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("PIP_TARGET", str(site))
    return site


def test_what_is_missing_is_installed_and_found_by_the_kernel_that_runs(site: Path) -> None:
    assert str(installing.complete(package="needy")) == "installed: needy-plain>=1"
    assert metadata.version("needy-plain") == "1.5"
    assert not (site / "needy_more.py").exists()
    assert installing.complete(package="needy").installed == ()


def test_with_nothing_missing_pip_is_not_asked(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    assert str(installing.complete()) == "everything that sd3tune needs is there"


def test_extras_and_extras_of_extras_are_followed(site: Path) -> None:
    assert [str(row) for row in installing.missing(package="needy")] == ["needy-plain>=1"]
    for extra in ("more", "all"):
        assert [str(row) for row in installing.missing(extra, package="needy")] == ["needy-plain>=1", "needy-more>=2"]


def test_an_extra_that_is_not_there_is_named_with_those_that_are(site: Path) -> None:
    with pytest.raises(ConfigError, match=r"needy has no extra 'mroe'; there are all, more"):
        installing.missing("mroe", package="needy")


def test_a_package_that_is_none_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match="nowhere is not installed as a package; run: pip install"):
        installing.missing(package="nowhere")


def test_what_a_kernel_uses_stays() -> None:
    kept = installing.constraints()
    assert {name: kept[name] for name in ("torch", "numpy", "ipykernel", "ipywidgets")} == {
        name: metadata.version(name) for name in ("torch", "numpy", "ipykernel", "ipywidgets")
    }
    assert kept["pytest"] == metadata.version("pytest")  # imported here
    assert "sd3tune" not in kept


def test_something_kept_that_is_too_old_is_a_sentence_and_not_a_new_torch(site: Path) -> None:
    about = site / "needy-1.0.dist-info" / "METADATA"
    about.write_text(about.read_text().replace("numpy>=1", "numpy>=99"))
    with pytest.raises(ConfigError, match=r"numpy>=99 is needed and .* is here; this is not replaced under a kernel that runs"):
        installing.complete(package="needy")
    assert not (site / "needy_plain.py").exists()


def test_a_dependency_may_not_replace_what_is_kept_either(site: Path) -> None:
    write_wheel(site.parent / "wheels", "numpy", "99.0")
    write_wheel(site.parent / "wheels", "needy_plain", "1.6", "numpy>=99")
    installing.complete(package="needy")
    assert metadata.version("needy-plain") == "1.5"
    assert not (site / "numpy.py").exists()


def test_what_pip_says_is_passed_on(site: Path) -> None:
    (site.parent / "wheels" / "needy_plain-1.5-py3-none-any.whl").unlink()
    with pytest.raises(ConfigError, match=r"(?s)pip could not install needy-plain>=1: .*No matching distribution"):
        installing.complete(package="needy")

"""What a wheel and an sdist say about the torch that they are for, and what an sdist holds."""

import subprocess
import tarfile
from collections.abc import Iterator
from email.parser import Parser

import pytest
import torch
from setup_script import ROOT, run_setup
from torch.utils import cpp_extension

import fused_bce

SDIST = f"fused_bce-{fused_bce.__version__}"
MINOR = ".".join(torch.__version__.split(".")[:2])


def required_torch(metadata) -> list[str]:
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    return [line for line in required if line.startswith("torch")]


@pytest.mark.parametrize("tagged", ["0", "1"])
def test_a_build_requires_the_torch_it_was_compiled_for(tmp_path, tagged):
    """Of a wheel, of what pip makes of the source folder, and of an editable install."""
    run_setup("egg_info", "--egg-base", tmp_path, TAG_VERSION=tagged)
    metadata = Parser().parsestr((tmp_path / "fused_bce.egg-info" / "PKG-INFO").read_text())
    assert required_torch(metadata) == [f"torch=={MINOR}.*"]
    tag = f"+pt{MINOR.replace('.', '')}cpu" if tagged == "1" else ""
    assert metadata["Version"] == fused_bce.__version__ + tag


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Iterator[tarfile.TarFile]:
    """With a tagged wheel built from it in the same command, as .ci/build-wheel does."""
    folder = tmp_path_factory.mktemp("sdist")
    run_setup("egg_info", "--egg-base", folder, "sdist", "-d", folder, TAG_VERSION="1")
    with tarfile.open(folder / f"{SDIST}.tar.gz") as sdist:
        yield sdist


def test_an_sdist_is_for_any_torch(sdist):
    metadata = Parser().parsestr(sdist.extractfile(f"{SDIST}/PKG-INFO").read().decode())
    assert metadata["Version"] == fused_bce.__version__
    assert required_torch(metadata) == ["torch>=2.11"]
    # Installers may take what an sdist says for what its wheel will say, but for this.
    assert "requires-dist" in metadata.get_all("Dynamic")


def test_an_sdist_has_every_file(sdist):
    """So that the tests pass in it, of which some read the pages and their figures."""
    try:
        listing = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this is no repository, or there is no git")
    assert {f"{SDIST}/{name}" for name in listing.splitlines()} <= {*sdist.getnames()}


def test_a_folder_without_nvcc_is_no_toolkit(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", "/absent")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert "no CUDA toolkit in /absent" in run_setup(FORCE_CUDA="1")


def test_the_tag_names_cuda(monkeypatch):
    """As the tags of others do, its release without the dot; no compiler is needed to say so."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", "/absent")
    environment = {"FORCE_CUDA": "1", "TAG_VERSION": "1", "TORCH_CUDA_ARCH_LIST": "9.0"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)  # version() is called after run_setup has put it back
    version = run_setup(**environment)["version"]()
    assert version == f"{fused_bce.__version__}+pt{MINOR.replace('.', '')}cu130"

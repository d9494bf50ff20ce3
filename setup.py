from pathlib import Path

from setuptools import setup

# The folders beside moss_jt/ install inside its namespace, so that one import name holds everything.
FOLDERS = {
    "moss_jt": "moss_jt",
    "moss_jt.convert": "convert",
    "moss_jt.kernels_cpu": "kernels_cpu",
    "moss_jt.kernels_cuda": "kernels_cuda",
}


def packages() -> dict[str, str]:
    found = dict(FOLDERS)
    for init in sorted(Path("moss_jt").glob("*/**/__init__.py")):
        found[".".join(init.parent.parts)] = str(init.parent)
    return found


# An independent implementation, for tests only. One version of torch, because each is gigabytes; `run` takes its CPU build.
parity = ["torch==2.13.0", "transformers>=4.40", "gguf>=0.10"]
plot = ["matplotlib>=3.5"]  # what `moss-jt bench vram --plot` draws with
test = ["pytest>=7", "hypothesis>=6", "ruff>=0.4", "setuptools>=70.1"]  # that setuptools builds wheels by itself
train = ["tensorboardX>=2.6"]  # logs for TensorBoard, without PyTorch

# What compiling for a GPU takes, as far as PyPI has it: for CUDA 13 all of it, for CUDA 12 all but nvcc. CuPy 14 needs numpy 2.
cuda12 = ["cuda-toolkit[cudart,cccl,cublas,curand]==12.*", "cupy-cuda12x<14"]
cuda13 = ["cuda-toolkit[nvcc,cccl,cublas,curand]==13.*", "cupy-cuda13x<14"]

setup(
    name="moss-jt",
    version="0.1.0",
    description="MOSS (moss-moon-003, 16 B) in Jittor, on the machine you already have",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.9,<3.13",
    package_dir=packages(),
    packages=list(packages()),
    package_data={
        "moss_jt.kernels_cpu": ["*.h"],
        "moss_jt.kernels_cuda": ["*.cuh"],
        "moss_jt.demo": ["*.json", "*.model", "*.safetensors", "*.txt"],
    },
    install_requires=[
        "jittor==1.3.11.0",
        "numpy>=1.22,<2",  # with numpy 2, Jittor 1.3.11 returns garbage silently
        "setuptools",  # Jittor imports it to find the compiler, and Python 3.12's venv comes without
        "click>=8.1",
        "rich>=13",
        "prompt_toolkit>=3.0.36",
        "safetensors>=0.4",
        "tokenizers>=0.15",
        "sentencepiece>=0.1.99",
        "huggingface_hub>=0.23",
        "sympy>=1.12",
        "PyYAML>=6",
    ],
    extras_require={"test": test, "parity": parity, "plot": plot, "train": train, "cuda12": cuda12, "cuda13": cuda13},
    entry_points={"console_scripts": ["moss-jt = moss_jt.cli:main"]},
)

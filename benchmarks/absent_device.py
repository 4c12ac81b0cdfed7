"""Describes TPUs and GPUs that this machine does not have, to compile for them.

`step_cost.py` compiles for one of them, and `pod.py` for many. Import this
module before JAX, which looks for devices when it is imported. The extra
``pod`` installs what it needs: libtpu for a TPU; for a GPU JAX's plugin for
CUDA and NVIDIA's assembler, without the libraries of CUDA.
"""

import os

os.environ.update(
  JAX_PLATFORMS="cpu",
  # Without these the compiler looks for a real pod.
  TPU_SKIP_MDS_QUERY="1",
  TPU_ACCELERATOR_TYPE="v5litepod-256",
  TPU_WORKER_HOSTNAMES="localhost",
  TPU_WORKER_ID="0",
  ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # Several processes may compile at once.
)

import importlib.util
import pathlib

from jax.experimental import topologies
import numpy as np

COMPILES = {  # Whether the compiler for a kind of device is installed.
  "tpu": importlib.util.find_spec("libtpu") is not None,
  "gpu": importlib.util.find_spec("jax_cuda12_plugin") is not None,
}
# Without a device no kernel can be chosen by its time.
XLA_FLAGS = "--xla_gpu_autotune_level=0"
if COMPILES["gpu"]:
  import nvidia

  folders = [pathlib.Path(folder) / "cuda_nvcc" for folder in nvidia.__path__]
  assembler = next(folder for folder in folders if folder.is_dir())
  XLA_FLAGS += f" --xla_gpu_cuda_data_dir={assembler}"
# XLA reads the flags when it compiles for the first time.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {XLA_FLAGS}"

# XLA's description of a GPU, a GpuTargetConfigProto, for an H100 with 80 GB.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 12 minor: 8 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def devices(topology: str) -> np.ndarray:
  """The devices of a topology, to compile for.

  It is of TPUs, such as ``v5e:2x2`` or ``v5p:4x4x4``, or of GPUs, such as
  ``h100:4x8``: 4 hosts with 8 GPUs each.
  """
  kind, shape = topology.split(":")
  if kind != "h100":
    described = topologies.get_topology_desc(topology, platform="tpu")
    return np.array(described.devices)
  shape = f"1x{shape}"  # One slice with all hosts.
  described = topologies.get_topology_desc(
    shape, platform="cuda", topology=shape, target_config=H100
  )
  return np.array(described.devices)

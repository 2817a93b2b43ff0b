"""The chips that kernels are compiled for, and what a compiler has to be told where they are absent.

jax reads all of this when it is first imported, so a process serves one target: see `environment`.
"""

import dataclasses
import os
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Target:
    """One chip; `topology` is libtpu's name of the smallest board, or "" for a GPU."""

    name: str
    platform: str  # "tpu" | "cuda"
    topology: str = ""
    sparse_cores: int = 0
    matrix_slots: int = 2  # products a bundle can issue
    matrix_width: int = 128  # columns of the matrix unit
    gpu: tuple = ()  # cores, bytes per second, bytes of L2, bytes of memory, compute capability, name


TARGETS = {target.name: target for target in (
    Target("v5e", "tpu", "v5e:2x2"),
    Target("v5p", "tpu", "v5p:2x2x1", sparse_cores=4),
    Target("v6e", "tpu", "v6e:2x2", sparse_cores=2, matrix_width=256),
    Target("tpu7x", "tpu", "tpu7x:2x2x1", sparse_cores=2, matrix_width=256),
    Target("h100", "cuda", gpu=(132, 3.35e12, 50 << 20, 80 << 30, 9, "NVIDIA H100 80GB HBM3")),
    Target("h200", "cuda", gpu=(132, 4.8e12, 50 << 20, 141 << 30, 9, "NVIDIA H200")),
    Target("b200", "cuda", gpu=(148, 7.67e12, 126 << 20, 178 << 30, 10, "NVIDIA B200")),
)}


def environment(target: Target, dumps: Path) -> dict[str, str]:
    """What a process that compiles for `target` and leaves its dumps in `dumps` is started with."""
    shared = dict(os.environ, JAX_PLATFORMS="cpu", JAX_ENABLE_COMPILATION_CACHE="false")
    shared.pop("XLA_FLAGS", None)
    if target.platform == "cuda":
        return shared | {"XLA_FLAGS": f"--xla_dump_to={dumps} --xla_dump_hlo_as_text=false"}
    return shared | {
        # The last pass alone: all of them would take as long to write as the compilation.
        "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={dumps} --xla_jf_dump_llo_text=true "
                            f"--xla_jf_dump_llo_pass_label_regex=.*final.* --xla_sc_dump_bundles_to={dumps}",
        # libtpu asks a cloud for its board otherwise, and lets one process in at a time.
        "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5p-8", "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


def gpu_config(target: Target) -> str:
    """The chip as XLA's GpuTargetConfigProto in text form, from its data sheet."""
    cores, bandwidth, l2, memory, capability, name = target.gpu
    return f"""gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
        shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: 128
        block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
        memory_bandwidth: {int(bandwidth)} l2_cache_size: {l2} clock_rate_ghz: 1.98 device_memory_size: {memory}
        shared_memory_per_block_optin: 232448
        cuda_compute_capability {{ major: {capability} feature_extension: ACCELERATED_FEATURES }}
        registers_per_core_limit: 65536 registers_per_block_limit: 65536
        thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
        device_vendor: "NVIDIA Corporation" device_address_bits: 64 name: "{name}"
        driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
        dnn_version: "9.10.0" }}
        platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{name}" """

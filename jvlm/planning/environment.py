"""What the compilers must be told to work without a device. Imports nothing, because it comes before JAX."""

# The compiler asks for a machine's description before it is told a topology; these say that there is none. The last
# lets several compile at a time: none of them holds a TPU.
WITHOUT_A_TPU = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

# XLA's compiler for NVIDIA GPUs says at every start that it found none.
WITHOUT_A_GPU = {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"}

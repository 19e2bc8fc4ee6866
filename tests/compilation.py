"""How the suite's own programs are compiled. Imports nothing, because it comes before JAX."""

# Most tests compile more than they compute. Without optimizations, with the older emitters of loops and with one module
# of LLVM for each program, compilation takes a sixth of the time, and the numbers are as good.
FAST = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)

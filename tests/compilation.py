"""How the suite's own programs are compiled. Imports nothing, because it comes before JAX."""

# Most tests compile more than they compute: this takes two thirds of the time, and the numbers are as good.
FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"

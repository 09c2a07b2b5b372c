# What the scripts for CUDA share: to be sourced, in the folder of the project.

# Sets CUDA_HOME where it is not set. nvcc on PATH may be a script that calls the one in the toolkit's
# folder, from which torch would derive a wrong one.
find_cuda_home() {
  if [ -z "${CUDA_HOME:-}" ]; then
    CUDA_HOME=$(realpath "$(nvcc --dryrun -x cu /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p')")
  fi
  export CUDA_HOME
}

# A number for everything that a compiled module is made of, and who compiled it for whom.
hash_of_module() {
  {
    "$1" -c 'import sys, torch; print(sys.version_info[:2], torch.__version__.split("+")[0], torch.version.cuda)'
    find csrc setup.py -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum
  } | sha256sum | cut -c1-16
}

"""
Solve the flows of the Python package pycnf with DifferentialEquations.jl, independently of Python.

A flow moves states by dz/dt = v(t, z) and their log-density by d log p / dt = -div v. This module evaluates
the multilayer perceptrons of pycnf and their exact divergence in Julia ([`velocity_and_divergence`](@ref)),
solves (z, log p) with the methods of OrdinaryDiffEq.jl ([`solve_field`](@ref)), and measures their errors
([`local_errors`](@ref), [`work_precision`](@ref)). Trained flows are read from the run folders that pycnf
writes ([`load_flow`](@ref)).

Batches are matrices whose columns are samples: D × B here where Python has (B, D).

The solvers come from the light packages OrdinaryDiffEqTsit5 and so on. Where only DifferentialEquations is
installed and this file is loaded by `include`, that package takes their place. Any algorithm of either may be
passed as `method`.

# Example
```julia
using PyCNFReference
flow = load_flow("runs/first")
solution = solve_flow(flow, randn(features(flow), 16))
solution[end].z[:, :, end]
```
"""
module PyCNFReference

import JSON

@static if Base.identify_package(@__MODULE__, "OrdinaryDiffEqTsit5") === nothing
    using DifferentialEquations
else
    using OrdinaryDiffEqTsit5, OrdinaryDiffEqVerner, OrdinaryDiffEqLowOrderRK
    using OrdinaryDiffEqAdamsBashforthMoulton, OrdinaryDiffEqRosenbrock
end

export Layer, MLP, Flow, FieldSolution
export features, velocity_and_divergence, unflatten
export algorithm, solve_field, solve_flow, local_errors, work_precision
export load_flow, read_safetensors

include("fields.jl")
include("solving.jl")
include("errors.jl")
include("runs.jl")
include("bridge.jl")

end

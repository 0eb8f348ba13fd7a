# Solves of (z, log p) along a field.

"Methods by name: order 5, 5, 7 and 9 (Runge-Kutta), variable order (Adams), order 5 for stiff fields (Rosenbrock)."
const METHODS = ("Tsit5", "DP5", "Vern7", "Vern9", "VCABM", "Rodas5P")

"""
    algorithm(method)

Solver algorithm named by `method`, one of "Tsit5", "DP5", "Vern7", "Vern9", "VCABM", "Rodas5P". An algorithm
object, such as `Vern8()`, is returned as it is.
"""
function algorithm(method::Union{AbstractString, Symbol})
    name = String(method)
    name in METHODS || throw(ArgumentError("unknown method \"$name\": choose one of $(join(METHODS, ", "))"))
    name in installed_methods() ||
        throw(ArgumentError("the installed DifferentialEquations has no $name: pass an algorithm object"))
    return getfield(@__MODULE__, Symbol(name))()
end
algorithm(method) = method

"Names of the methods that the solver packages in use have: all, but for some releases of DifferentialEquations."
installed_methods() = filter(name -> isdefined(@__MODULE__, Symbol(name)), METHODS)

"A field, with a context for every sample or `nothing`, as the parameter of an ODE problem."
struct Dynamics{C}
    field::MLP
    context::C
end

# The rows of u are z and log p, its columns the samples; the whole batch is one system, as in pycnf.
function joint!(du, u, dynamics::Dynamics, t)
    D = size(u, 1) - 1
    v, div = velocity_and_divergence(dynamics.field, t, u[1:D, :], dynamics.context)
    du[1:D, :] .= v
    du[D + 1, :] .= .-div
    return nothing
end

"""
    FieldSolution

One solve: times `ts` (K), states `z` (D × B × K), change of the log-density `logp` (B × K), evaluations `nf`,
accepted and rejected steps `naccept` and `nreject`, and all times at which a step ended (`steps`).
"""
struct FieldSolution
    ts::Vector{Float64}
    z::Array{Float64, 3}
    logp::Matrix{Float64}
    nf::Int
    naccept::Int
    nreject::Int
    steps::Vector{Float64}
end

"""
    solve_field(field, z0; context, T = 1.0, times, method = "Vern9", rtol = 1e-13, atol = 1e-13,
                exact = true, reverse = false)

Solve dz/dt = v, d log p / dt = -div v from the states `z0` (D × B) with log p = 0, over [0, T] or back.

`times` are interior times in the order of the solve. With `exact` a step ends at each of them; without, the
states there come from the method's dense output. Returns a [`FieldSolution`](@ref) whose first and last times
are the ends.
"""
function solve_field(
    field::MLP,
    z0::AbstractMatrix;
    context = nothing,
    T = 1.0,
    times = Float64[],
    method = "Vern9",
    rtol = 1.0e-13,
    atol = 1.0e-13,
    exact = true,
    reverse = false,
)
    D, B = size(z0)
    D == features(field) || throw(DimensionMismatch("expected $(features(field)) × B states, got $D × $B"))
    ends = reverse ? (Float64(T), 0.0) : (0.0, Float64(T))
    problem = ODEProblem(joint!, vcat(Matrix{Float64}(z0), zeros(1, B)), ends, Dynamics(field, context))
    interior = collect(Float64, times)
    sol = solve(
        problem,
        algorithm(method);
        abstol = Float64(atol),
        reltol = Float64(rtol),
        tstops = exact ? interior : Float64[],
        save_everystep = true,
        dense = !exact,
    )
    sol.retcode == ReturnCode.Success || error("$method ended at t = $(sol.t[end]) with $(sol.retcode)")
    ts = [ends[1]; interior; ends[2]]
    states = [exact || t in ends ? sol.u[argmin(abs.(sol.t .- t))] : sol(t) for t in ts]
    u = reshape(reduce(hcat, states), D + 1, B, length(ts))
    stats = sol.stats
    return FieldSolution(
        ts,
        u[1:D, :, :],
        u[D + 1, :, :],
        stats.nf,
        stats.naccept,
        stats.nreject,
        collect(Float64, sol.t),
    )
end

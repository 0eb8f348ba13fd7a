# What solves get wrong: per step, and as a whole against their cost.

"""
    local_errors(field, z0; context, T = 1.0, method = "Tsit5", rtol = 1e-5, atol = 1e-5)

Local truncation error of every accepted step: the state it reached minus the solution from its own start,
solved again by Vern9 at 1e-13. Returns a named tuple with the starts `t` and sizes `h` of the S steps, and the
errors `z` (D × B × S) and `logp` (B × S).
"""
function local_errors(
    field::MLP,
    z0::AbstractMatrix;
    context = nothing,
    T = 1.0,
    method = "Tsit5",
    rtol = 1.0e-5,
    atol = 1.0e-5,
)
    D, B = size(z0)
    dynamics = Dynamics(field, context)
    problem = ODEProblem(joint!, vcat(Matrix{Float64}(z0), zeros(1, B)), (0.0, Float64(T)), dynamics)
    sol = solve(
        problem,
        algorithm(method);
        abstol = Float64(atol),
        reltol = Float64(rtol),
        save_everystep = true,
    )
    sol.retcode == ReturnCode.Success || error("$method ended at t = $(sol.t[end]) with $(sol.retcode)")
    S = length(sol.t) - 1
    z, logp = zeros(D, B, S), zeros(B, S)
    for k in 1:S
        step = ODEProblem(joint!, copy(sol.u[k]), (sol.t[k], sol.t[k + 1]), dynamics)
        truth = solve(step, Vern9(); abstol = 1.0e-13, reltol = 1.0e-13, save_everystep = false)
        e = sol.u[k + 1] .- truth.u[end]
        z[:, :, k] .= e[1:D, :]
        logp[:, k] .= e[D + 1, :]
    end
    return (t = sol.t[1:S], h = sol.t[2:end] .- sol.t[1:S], z = z, logp = logp)
end

"""
    work_precision(field, z0; context, T = 1.0, methods, tolerances)

Solve with every method (all that are installed) at every tolerance (rtol = atol, 1e-3 to 1e-10 by default) and
compare the states at T with Vern9 at 1e-13. Returns a vector of named tuples `method, tol, nf, naccept, nreject, max_error_z,
max_error_logp, rms_error_z, rms_error_logp`.
"""
function work_precision(
    field::MLP,
    z0::AbstractMatrix;
    context = nothing,
    T = 1.0,
    methods = installed_methods(),
    tolerances = [10.0^-k for k in 3:10],
)
    truth = solve_field(field, z0; context, T)
    rms(x) = sqrt(sum(abs2, x) / length(x))
    return map(vec([(method, tol) for tol in tolerances, method in methods])) do (method, tol)
        s = solve_field(field, z0; context, T, method, rtol = tol, atol = tol)
        z = s.z[:, :, end] .- truth.z[:, :, end]
        logp = s.logp[:, end] .- truth.logp[:, end]
        (
            method = string(method),
            tol = tol,
            nf = s.nf,
            naccept = s.naccept,
            nreject = s.nreject,
            max_error_z = maximum(abs, z),
            max_error_logp = maximum(abs, logp),
            rms_error_z = rms(z),
            rms_error_logp = rms(logp),
        )
    end
end

# What the Python package calls: numbers, strings and arrays in, structs of arrays out. Arrays of NumPy arrive
# as views and are copied first.

"""
    solve_arrays(parameters, sizes, activation, time, inputs, T, times, method, rtol, atol, exact, reverse)

[`solve_field`](@ref) for the field of [`unflatten`](@ref). `inputs` holds the states and below them the
context, (D + C) × B.
"""
function solve_arrays(
    parameters,
    sizes,
    activation,
    time,
    inputs,
    T,
    times,
    method,
    rtol,
    atol,
    exact,
    reverse,
)
    field, z0, context = read_arrays(parameters, sizes, activation, time, inputs)
    interior = Vector{Float64}(times)
    return solve_field(field, z0; context, T, times = interior, method, rtol, atol, exact, reverse)
end

"""
    local_error_arrays(parameters, sizes, activation, time, inputs, T, method, rtol, atol)

[`local_errors`](@ref) for the field of [`unflatten`](@ref).
"""
function local_error_arrays(parameters, sizes, activation, time, inputs, T, method, rtol, atol)
    field, z0, context = read_arrays(parameters, sizes, activation, time, inputs)
    return local_errors(field, z0; context, T, method, rtol, atol)
end

function read_arrays(parameters, sizes, activation, time, inputs)
    field = unflatten(Vector{Float64}(parameters), Vector{Int}(sizes), String(activation), String(time))
    u, D = Matrix{Float64}(inputs), features(field)
    return field, u[1:D, :], size(u, 1) > D ? u[(D + 1):end, :] : nothing
end

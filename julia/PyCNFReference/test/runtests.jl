using PyCNFReference
using Test
import JSON

# Deterministic numbers in [-1, 1] without a random number generator, whose stream may change with Julia.
numbers(shape...; shift = 0.0) = reshape([sin(12.9898 * k + shift) for k in 1:prod(shape)], shape...)

"Field with fixed weights: widths [D + C, hidden..., D]."
function make_field(sizes, activation, time; scale = 1.0)
    extra = Dict("none" => 0, "concat" => 1, "concatsquash" => 3)[time]
    count = sum(m * (n + 1 + extra) for (n, m) in zip(sizes[1:(end - 1)], sizes[2:end]))
    return unflatten(scale .* numbers(count), sizes, activation, time)
end

"Divergence by central differences of the velocity."
function numerical_divergence(field, t, z, context; h = 1.0e-6)
    total = zeros(size(z, 2))
    for i in axes(z, 1)
        up, down = copy(z), copy(z)
        up[i, :] .+= h
        down[i, :] .-= h
        forward, _ = velocity_and_divergence(field, t, up, context)
        backward, _ = velocity_and_divergence(field, t, down, context)
        total .+= (forward[i, :] .- backward[i, :]) ./ 2h
    end
    return total
end

const ACTIVATIONS = ("tanh", "softplus", "sigmoid", "silu", "sin")
const TIMES = ("none", "concat", "concatsquash")
const CONTEXTS = (0, 2)

@testset "divergence: $f, $time, context $C" for f in ACTIVATIONS, time in TIMES, C in CONTEXTS
    field = make_field([3 + C, 7, 5, 3], f, time)
    z, context = numbers(3, 6), C == 0 ? nothing : numbers(C, 6; shift = 1.0)
    v, div = velocity_and_divergence(field, 0.3, z, context)
    @test size(v) == (3, 6)
    @test div ≈ numerical_divergence(field, 0.3, z, context) atol = 1.0e-7
end

@testset "one hidden layer written out" begin
    W, b, w = [1.0 2.0; -0.5 0.3; 0.2 -0.7], [0.1, -0.2, 0.3], [0.5, 0.4, -0.6]
    V, c = [0.7 -0.1 0.2; 0.4 0.9 -0.3], [0.05, -0.15]
    zero_time = zeros(2)
    field = MLP([Layer(W, b; time_weight = w), Layer(V, c; time_weight = zero_time)], "tanh")
    z, t = [0.3, -0.8], 0.25
    h = tanh.(W * z + b + t * w)
    J = V * [(1 - h[i]^2) * W[i, j] for i in 1:3, j in 1:2]
    v, div = velocity_and_divergence(field, t, reshape(z, 2, 1))
    @test vec(v) ≈ V * h + c
    @test div[1] ≈ J[1, 1] + J[2, 2]
    flat = [vec(permutedims(W)); b; w; vec(permutedims(V)); c; zero_time]
    same, _ = velocity_and_divergence(unflatten(flat, [2, 3, 2], "tanh", "concat"), t, reshape(z, 2, 1))
    @test same == v
    @test_throws ArgumentError unflatten(flat[1:(end - 1)], [2, 3, 2], "tanh", "concat")
    @test_throws ArgumentError MLP(field.layers, "relu")
end

@testset "methods agree" begin
    @test PyCNFReference.installed_methods() == PyCNFReference.METHODS
    field, z0 = make_field([2, 8, 8, 2], "tanh", "concatsquash"), numbers(2, 5)
    truth = solve_field(field, z0; T = 0.5, times = [0.1, 0.3])
    @test truth.ts == [0.0, 0.1, 0.3, 0.5]
    @test truth.z[:, :, 1] == z0
    @test all(truth.logp[:, 1] .== 0)
    @test issubset(truth.ts, truth.steps)
    for method in ("Tsit5", "DP5", "Vern7", "Vern9", "VCABM", "Rodas5P"), exact in (true, false)
        s = solve_field(field, z0; T = 0.5, times = [0.1, 0.3], method, rtol = 1.0e-10, atol = 1.0e-10, exact)
        @test maximum(abs, s.z[:, :, end] .- truth.z[:, :, end]) < 1.0e-7
        @test maximum(abs, s.logp[:, end] .- truth.logp[:, end]) < 1.0e-7
        @test maximum(abs, s.z .- truth.z) < 1.0e-4
        @test s.nf > 0
    end
    @test_throws ArgumentError solve_field(field, z0; method = "Euler")
    @test_throws DimensionMismatch solve_field(field, numbers(3, 5))
    back = solve_field(field, truth.z[:, :, end]; T = 0.5, times = [0.3, 0.1], reverse = true)
    @test back.z[:, :, end] ≈ z0 atol = 1.0e-10
    @test back.logp[:, end] ≈ -truth.logp[:, end] atol = 1.0e-10
end

@testset "straight lines have no local error" begin
    still = make_field([2, 4, 2], "tanh", "none"; scale = 0.0)
    line = MLP([still.layers[1], Layer(still.layers[2].W, [1.0, -2.0])], "tanh")
    curve = make_field([2, 4, 2], "tanh", "none")
    for method in ("Tsit5", "DP5", "Vern7", "Vern9")
        @test maximum(abs, local_errors(line, numbers(2, 3); method).z) < 1.0e-14
    end
    errors = local_errors(curve, numbers(2, 3); method = "Tsit5", rtol = 1.0e-3, atol = 1.0e-3)
    @test maximum(abs, errors.z) > 1.0e-11
    @test sum(errors.h) ≈ 1.0
    @test size(errors.z) == (2, 3, length(errors.t))
end

@testset "work and precision" begin
    rows = work_precision(
        make_field([2, 8, 2], "tanh", "concat"),
        numbers(2, 4);
        methods = ("Tsit5", "Vern7"),
        tolerances = [1.0e-4, 1.0e-8],
    )
    @test length(rows) == 4
    @test rows[2].max_error_z < rows[1].max_error_z
    @test rows[2].nf > rows[1].nf
    @test all(row.rms_error_logp <= row.max_error_logp for row in rows)
end

"Write tensors as pycnf does: row by row, in single precision."
function write_safetensors(path, tensors)
    header, body = Dict{String, Any}("__metadata__" => Dict("format" => "pt")), UInt8[]
    for (name, tensor) in tensors
        values = tensor isa Matrix ? vec(permutedims(tensor)) : tensor
        bytes = collect(reinterpret(UInt8, Float32.(values)))
        shape = collect(size(tensor))
        offsets = [length(body), length(body) + length(bytes)]
        header[name] = Dict("dtype" => "F32", "shape" => shape, "data_offsets" => offsets)
        append!(body, bytes)
    end
    text = JSON.json(header)
    open(path, "w") do file
        write(file, htol(UInt64(sizeof(text))), text, body)
    end
    return nothing
end

@testset "run folders" begin
    mktempdir() do folder
        field = make_field([2, 6, 2], "silu", "concat")
        tensors = Dict{String, Array{Float64}}()
        for block in 0:1, (l, layer) in enumerate(field.layers)
            prefix = "fields.$block.layers.$(l - 1)."
            tensors[prefix * "weight"] = layer.W
            tensors[prefix * "bias"] = layer.b
            tensors[prefix * "time_weight"] = layer.time_weight
        end
        write_safetensors(joinpath(folder, "model.safetensors"), tensors)
        flow = Dict("features" => 2, "hidden" => [6], "blocks" => 2, "activation" => "silu", "T" => 0.5)
        write(joinpath(folder, "config.json"), JSON.json(Dict("flow" => flow)))
        loaded = load_flow(folder)
        @test length(loaded.fields) == 2
        @test loaded.fields[1].layers[1].W ≈ field.layers[1].W atol = 1.0e-7
        @test loaded.fields[2].layers[2].time_weight ≈ field.layers[2].time_weight atol = 1.0e-7
        x = numbers(2, 4)
        there = solve_flow(loaded, x)
        @test length(there) == 2
        back = solve_flow(loaded, there[end].z[:, :, end]; reverse = true)
        @test back[end].z[:, :, end] ≈ x atol = 1.0e-9
    end
end

@testset "calls from Python" begin
    field, u = make_field([3, 5, 2], "tanh", "concat"), numbers(3, 4)
    flat = mapreduce(l -> [vec(permutedims(l.W)); l.b; l.time_weight], vcat, field.layers)
    sizes, times = view([3, 5, 2], :), view([0.5], :)
    settings = ("Vern9", 1.0e-10, 1.0e-10)
    s = PyCNFReference.solve_arrays(
        view(flat, :),
        sizes,
        "tanh",
        "concat",
        view(u, :, :),
        1.0,
        times,
        settings...,
        true,
        false,
    )
    direct = solve_field(field, u[1:2, :]; context = u[3:3, :], times = [0.5], rtol = 1.0e-10, atol = 1.0e-10)
    @test s.z == direct.z
    @test s.logp == direct.logp
    errors = PyCNFReference.local_error_arrays(flat, sizes, "tanh", "concat", u, 1.0, "Tsit5", 1.0e-4, 1.0e-4)
    @test size(errors.logp, 1) == 4
end

# Solves recorded earlier (Vern9 at 1e-13), in the folder julia-reference beside the one that PYCNF_DATA names.
recorded = joinpath(get(ENV, "PYCNF_DATA", "."), "..", "julia-reference")
if isfile(joinpath(recorded, "reference.json"))
    @testset "recorded solves: $name" for name in ("mlp2", "mlp6")
        inputs = JSON.parsefile(joinpath(recorded, "inputs.json"))[name]
        wanted = JSON.parsefile(joinpath(recorded, "reference.json"))["cases"][name]
        rows(m) = permutedims(reduce(hcat, [Float64.(row) for row in m]))
        layers = map(inputs["layers"]) do layer
            weight = rows(layer["weight"])
            Layer(weight[:, 2:end], Float64.(layer["bias"]); time_weight = weight[:, 1])
        end
        times = Float64.(wanted["times"])
        s = solve_field(MLP(layers, "tanh"), permutedims(rows(inputs["z0"])); times = times[2:(end - 1)])
        for k in eachindex(times)
            state = permutedims(rows(wanted["states"][k]))
            @test s.z[:, :, k] ≈ state[1:(end - 1), :] atol = 1.0e-11
            @test s.logp[:, k] ≈ state[end, :] atol = 1.0e-11
        end
    end
end

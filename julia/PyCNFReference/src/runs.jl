# Trained flows, read from the folders that pycnf writes.

"""
    Flow(fields, T)

Fields of the blocks of a flow, solved one after another over [0, T] each.
"""
struct Flow
    fields::Vector{MLP}
    T::Float64
end

features(flow::Flow) = features(flow.fields[1])

"""
    solve_flow(flow, x; reverse = false, settings...)

Carry states `x` (D × B) through all blocks, from data to base density or, with `reverse`, back. `settings` are
those of [`solve_field`](@ref). Returns one [`FieldSolution`](@ref) a block, in the order of the solve.
"""
function solve_flow(flow::Flow, x::AbstractMatrix; reverse = false, settings...)
    solutions = FieldSolution[]
    z = Matrix{Float64}(x)
    for field in (reverse ? Iterators.reverse(flow.fields) : flow.fields)
        push!(solutions, solve_field(field, z; T = flow.T, reverse, settings...))
        z = solutions[end].z[:, :, end]
    end
    return solutions
end

"""
    load_flow(folder)

Read a flow from a run folder of pycnf: `config.json` and `model.safetensors`, weights converted to Float64.
"""
function load_flow(folder::AbstractString)
    config = JSON.parsefile(joinpath(folder, "config.json"))["flow"]
    haskey(config, "field") &&
        throw(ArgumentError("$folder holds a flow with a field of its own, not an MLP"))
    tensors = read_safetensors(joinpath(folder, "model.safetensors"))
    depth = length(config["hidden"]) + 1
    fields = map(0:(Int(config["blocks"]) - 1)) do block
        layers = map(0:(depth - 1)) do l
            prefix = "fields.$block.layers.$l."
            names = ("time_weight", "gate_weight", "gate_bias", "shift_weight")
            vectors = [tensors[prefix * name] for name in names if haskey(tensors, prefix * name)]
            make_layer(tensors[prefix * "weight"], tensors[prefix * "bias"], vectors)
        end
        MLP(layers, String(config["activation"]))
    end
    return Flow(fields, Float64(config["T"]))
end

"""
    read_safetensors(path)

Read the vectors and matrices of a safetensors file as Float64, by name.

The file holds the length of its header (8 bytes), the header in JSON and the values, matrices row by row.
"""
function read_safetensors(path::AbstractString)
    types = Dict("F64" => Float64, "F32" => Float32, "F16" => Float16)
    bytes = read(path)
    n = Int(ltoh(reinterpret(UInt64, bytes[1:8])[1]))
    header = JSON.parse(String(bytes[9:(8 + n)]))
    tensors = Dict{String, Array{Float64}}()
    for (name, entry) in header
        name == "__metadata__" && continue
        from, to = Int(entry["data_offsets"][1]), Int(entry["data_offsets"][2])
        values = Float64.(reinterpret(types[entry["dtype"]], bytes[(9 + n + from):(8 + n + to)]))
        shape = [Int(size) for size in entry["shape"]]
        tensors[name] = length(shape) == 2 ? permutedims(reshape(values, shape[2], shape[1])) : values
    end
    return tensors
end

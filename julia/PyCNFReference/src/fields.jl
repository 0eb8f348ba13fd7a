# The fields of pycnf and their exact divergence.

sigmoid(a) = 1 / (1 + exp(-a))
softplus(a) = a > 0 ? a + log1p(exp(-a)) : log1p(exp(a))

"Activations by their name in pycnf: the function and its derivative."
const ACTIVATIONS = Dict{String, Tuple{Function, Function}}(
    "tanh" => (tanh, a -> 1 - tanh(a)^2),
    "softplus" => (softplus, sigmoid),
    "sigmoid" => (sigmoid, a -> sigmoid(a) * (1 - sigmoid(a))),
    "silu" => (a -> a * sigmoid(a), a -> sigmoid(a) * (1 + a * (1 - sigmoid(a)))),
    "sin" => (sin, cos),
)

"""
    Layer(W, b; time_weight, gate_weight, gate_bias, shift_weight)

Affine map conditioned on time, with `W` of shape out × in and vectors of length out:

- without further vectors: y = W x + b;
- with `time_weight` w: y = W x + b + t w;
- with `gate_weight` u, `gate_bias` s and `shift_weight` c: y = sigmoid(t u + s) .* (W x + b) + t c.
"""
struct Layer
    W::Matrix{Float64}
    b::Vector{Float64}
    time_weight::Vector{Float64}
    gate_weight::Vector{Float64}
    gate_bias::Vector{Float64}
    shift_weight::Vector{Float64}
end

function Layer(
    W,
    b;
    time_weight = Float64[],
    gate_weight = Float64[],
    gate_bias = Float64[],
    shift_weight = Float64[],
)
    return Layer(W, b, time_weight, gate_weight, gate_bias, shift_weight)
end

"Matrix and offset of a layer at time `t`."
function affine(layer::Layer, t)
    if !isempty(layer.time_weight)
        return layer.W, layer.b .+ t .* layer.time_weight
    elseif !isempty(layer.gate_weight)
        gate = sigmoid.(t .* layer.gate_weight .+ layer.gate_bias)
        return gate .* layer.W, gate .* layer.b .+ t .* layer.shift_weight
    end
    return layer.W, layer.b
end

"""
    MLP(layers, activation)

Multilayer perceptron v(t, z): h₀ = [z; context], hₗ = activation(layerₗ(t, hₗ₋₁)), v = last layer of h.
`activation` is one of "tanh", "softplus", "sigmoid", "silu", "sin".
"""
struct MLP
    layers::Vector{Layer}
    activation::String
    function MLP(layers, activation)
        haskey(ACTIVATIONS, activation) || throw(ArgumentError("unknown activation \"$activation\""))
        length(layers) >= 2 || throw(ArgumentError("expected at least two layers, got $(length(layers))"))
        return new(layers, activation)
    end
end

"""
    features(field)

Number D of dimensions of the states.
"""
features(field::MLP) = length(field.layers[end].b)

"""
    velocity_and_divergence(field, t, z, context = nothing)

Velocity v (D × B) and divergence tr ∂v/∂z (length B) at time `t` and states `z` (D × B), with a context C × B
or `nothing`. The derivatives along the D unit directions go through the layers beside the value, as an array
width × B × D.
"""
function velocity_and_divergence(field::MLP, t, z::AbstractMatrix, context = nothing)
    D, B = size(z)
    value, slope = ACTIVATIONS[field.activation]
    W, b = affine(field.layers[1], t)
    a = W * (context === nothing ? z : vcat(z, context)) .+ b
    J = reshape(W[:, 1:D], :, 1, D) .* reshape(slope.(a), :, B, 1)
    for layer in field.layers[2:(end - 1)]
        W, b = affine(layer, t)
        a = W * value.(a) .+ b
        J = reshape(W * reshape(J, :, B * D), :, B, D) .* reshape(slope.(a), :, B, 1)
    end
    W, b = affine(field.layers[end], t)
    v = W * value.(a) .+ b
    div = vec(sum(reshape(permutedims(W), :, 1, D) .* J; dims = (1, 3)))
    return v, div
end

"""
    unflatten(parameters, sizes, activation, time)

Build an [`MLP`](@ref) from one vector of parameters: layer after layer the weight row by row, the bias, then
for `time = "concat"` the weight of time and for `time = "concatsquash"` gate weight, gate bias and shift
weight. `sizes` are the widths [D + C, hidden..., D].
"""
function unflatten(parameters::Vector{Float64}, sizes::Vector{Int}, activation, time)
    extra = Dict("none" => 0, "concat" => 1, "concatsquash" => 3)
    haskey(extra, time) || throw(ArgumentError("unknown time conditioning \"$time\""))
    used = 0
    function take(n)
        used + n <= length(parameters) || throw(ArgumentError("too few parameters: $(length(parameters))"))
        used += n
        return parameters[(used - n + 1):used]
    end
    layers = Layer[]
    for (n, m) in zip(sizes[1:(end - 1)], sizes[2:end])
        W = permutedims(reshape(take(n * m), n, m))
        b = take(m)
        vectors = [take(m) for _ in 1:extra[time]]
        push!(layers, make_layer(W, b, vectors))
    end
    used == length(parameters) || throw(ArgumentError("expected $used parameters, got $(length(parameters))"))
    return MLP(layers, activation)
end

function make_layer(W, b, vectors)
    isempty(vectors) && return Layer(W, b)
    length(vectors) == 1 && return Layer(W, b; time_weight = vectors[1])
    return Layer(W, b; gate_weight = vectors[1], gate_bias = vectors[2], shift_weight = vectors[3])
end

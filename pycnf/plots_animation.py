"""A density that forms over time, as a piece of HTML with a slider and a button."""

from __future__ import annotations

import base64
import hashlib
import html
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from string import Template

import torch
from torch import Tensor

from pycnf.flow import CNF
from pycnf.plots_flows import check_flows, density_grid, solve_paths
from pycnf.scale import evaluation_mode

WHITE = (255, 255, 255)
DOT = 3.0  # radius of a sample in half pixels


@dataclass(frozen=True)
class Animation:
    """Show pictures one after another on a page: a slider, and a button that plays them when it is pressed.

    It is one piece of HTML with everything in it. Nothing moves unless asked to, and for readers who prefer reduced
    motion there is the slider alone.

    Attributes:
        frames: Pictures, each a WebP file.
        labels: What the slider says at each.
        heads: Names above the parts of a picture, from left to right.
        alt: What the pictures show, in words.
    """

    frames: tuple[bytes, ...] = field(repr=False)
    labels: tuple[str, ...]
    heads: tuple[str, ...]
    alt: str

    def html(self) -> str:
        """Return the piece of HTML."""
        sources = [f"data:image/webp;base64,{base64.b64encode(frame).decode()}" for frame in self.frames]
        return PLAYER.substitute(
            id="frames-" + hashlib.sha256(b"".join(self.frames)).hexdigest()[:10],
            count=len(self.heads),
            heads="".join(f"<span>{html.escape(head)}</span>" for head in self.heads),
            last=len(sources) - 1,
            source=sources[-1],
            label=html.escape(self.labels[-1]),
            alt=html.escape(self.alt, quote=True),
            sources=",".join(f'"{source}"' for source in sources),
            labels=",".join(f'"{html.escape(label)}"' for label in self.labels),
        )

    def save(self, path: str | Path) -> Path:
        """Write a page of its own.

        Args:
            path: File to write; its folder is created.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        head = (
            '<!DOCTYPE html><html lang="en"><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width"><title>A density forms</title>'
        )
        path.write_text(head + self.html() + "</html>", encoding="utf-8")
        return path

    def _repr_html_(self) -> str:
        return self.html()

    def _repr_png_(self) -> bytes:
        """Return the last picture, for what cannot show an animation: paper."""
        from PIL import Image

        buffer = io.BytesIO()
        Image.open(io.BytesIO(self.frames[-1])).save(buffer, format="PNG")
        return buffer.getvalue()


def forming_animation(
    flows: Mapping[str, CNF],
    *,
    extent: tuple[float, float, float, float] = (-4.0, 4.0, -4.0, 4.0),
    frames: int = 25,
    samples: int = 150,
    resolution: int = 56,
    pixels: int = 300,
    seed: int = 0,
) -> Animation:
    """Animate how densities in the plane form from the base density, with samples that move along.

    Args:
        flows: Flows of two features without context, by name.
        extent: Window (left, right, bottom, top).
        frames: Number of pictures.
        samples: Number of samples, drawn as dots; they begin at the same noise in every flow.
        resolution: Points along each side at which a density is computed.
        pixels: Pixels along each side of a density.
        seed: Seed of the noise.

    Raises:
        ValueError: There is no flow, or one has not two features, or a context.
    """
    import numpy as np
    from matplotlib import colormaps
    from PIL import Image, ImageDraw

    check_flows(flows, features=2)
    parts = torch.linspace(1, 0, frames)
    noise = torch.randn(samples, 2, generator=torch.Generator().manual_seed(seed))
    gap, color = pixels // 24, colormaps["viridis"]
    height = round(pixels * (extent[3] - extent[2]) / (extent[1] - extent[0]))
    pictures = [Image.new("RGBA", (len(flows) * (pixels + gap) - gap, height), (0, 0, 0, 0)) for _ in range(frames)]
    for column, flow in enumerate(flows.values()):
        moving = _moving(flow, noise, parts)
        for picture, part, z in zip(pictures, parts.tolist(), moving, strict=True):
            density = density_grid(flow, part * flow.T * flow.blocks, extent, resolution).flip(0).numpy()
            large = (2 * pixels, 2 * height)  # drawn at twice the size for smooth dots
            smooth = Image.fromarray(density / density.max()).resize(large, Image.Resampling.BICUBIC)
            panel = Image.fromarray(color(np.asarray(smooth), bytes=True)).convert("RGBA")
            draw = ImageDraw.Draw(panel)
            for a, b in z.tolist():
                x = (a - extent[0]) / (extent[1] - extent[0]) * large[0]
                y = (extent[3] - b) / (extent[3] - extent[2]) * large[1]
                draw.ellipse((x - DOT, y - DOT, x + DOT, y + DOT), fill=WHITE)
            panel = panel.resize((pixels, height), Image.Resampling.LANCZOS)
            picture.paste(panel, (column * (pixels + gap), 0))
    files = []
    for picture in pictures:
        buffer = io.BytesIO()
        picture.save(buffer, format="webp", quality=80, method=4)
        files.append(buffer.getvalue())
    first = next(iter(flows.values()))
    end = first.T * first.blocks
    return Animation(
        frames=tuple(files),
        labels=tuple(f"t = {part * end:.2f}" for part in parts.tolist()),
        heads=tuple(flows),
        alt=f"Densities of {', '.join(flows)} forming from the base density to the data, samples moving along",
    )


PLAYER = Template("""<div id="$id" class="pycnf-frames" role="group" aria-label="$alt">
<style>#$id{max-width:52rem}#$id img{width:100%;height:auto;background:none;padding:0}
#$id .heads{display:grid;grid-template-columns:repeat($count,1fr);text-align:center}
#$id .bar{display:flex;gap:.7em;align-items:center}#$id input{flex:1;min-width:6em}
#$id output{min-width:5em;font-variant-numeric:tabular-nums}
@media (prefers-reduced-motion:reduce){#$id button{display:none}}</style>
<div class="heads">$heads</div>
<img src="$source" alt="$alt">
<div class="bar"><button type="button">Play</button>
<input type="range" min="0" max="$last" value="$last" aria-label="time, from the base density to the data">
<output>$label</output></div>
<script>(() => {
const root = document.getElementById("$id"), frames = [$sources], labels = [$labels];
const image = root.querySelector("img"), range = root.querySelector("input");
const button = root.querySelector("button"), output = root.querySelector("output");
let timer = null;
const show = () => { image.src = frames[range.value]; output.value = labels[range.value]; };
const stop = () => { clearInterval(timer); timer = null; button.textContent = "Play"; };
button.onclick = () => {
  if (timer) return stop();
  if (Number(range.value) === $last) range.value = 0;
  show();
  button.textContent = "Pause";
  timer = setInterval(() => { range.value = Number(range.value) + 1; show();
    if (Number(range.value) === $last) stop(); }, 120);
};
range.oninput = () => { stop(); show(); };
})();</script></div>""")


def _moving(flow: CNF, noise: Tensor, parts: Tensor) -> Tensor:
    """Return where noise is on its way to the data, at decreasing parts of the whole time, (K, B, D)."""
    like = next(flow.parameters(), torch.zeros(()))
    with torch.no_grad(), evaluation_mode(flow):
        x = flow.solve(noise.to(like), reverse=True, density=False).z
    paths = solve_paths(flow, x, points=200)
    wanted = parts * flow.T * flow.blocks
    nearest = (paths.ts[None] - wanted[:, None]).abs().argmin(1)
    return paths.z[nearest]


__all__ = ["Animation", "forming_animation"]

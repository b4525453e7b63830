"""The boxes: what an artist sees of a task, and the plumbing behind it."""

from __future__ import annotations

from typing import Any, NamedTuple

from .graph import Box, Node, Output, Socket

ALIASES = ["attention distillation", "style transfer", "style reference"]
TEXTURE_ALIASES = ["texture", "texture synthesis", *ALIASES]
PAPER = {"sampler_name": "euler", "scheduler": "ddim_uniform"}
"""What the paper samples with."""
NEGATIVE = "blurry, low quality, text, watermark"
OF_EMPTY_PROMPT, OF_PROMPT = 1.0, 3.5
"""FLUX's guidance; Stable Diffusion does not read it."""


class Wires(NamedTuple):
    """What every box is given of a checkpoint."""

    model: Socket
    clip: Socket
    vae: Socket


def checkpoint(box: Box) -> Wires:
    """The wires from Load Checkpoint."""
    return Wires(box.wire("model", "MODEL"), box.wire("clip", "CLIP"), box.wire("vae", "VAE"))


def picture(box: Box, name: str, label: str, example: str, choice: str = "or an example") -> Node:
    """A picture by wire, and an example where there is no wire."""
    own = box.wire(name, "IMAGE", label)
    return box.add("ADExampleReference", title=f"{name.replace('_', ' ').capitalize()}, or an example", image=own,
                   picture=box.setting(choice, example, f"{name}_example"))  # fmt: skip


def empty_prompt(box: Box, clip: Socket) -> Node:
    """The text that references are read with."""
    return box.add("CLIPTextEncode", title="Empty prompt", clip=clip, text="", at_least=(WIDE, 120))


def capture(box: Box, wires: Wires, image: Output, text: Output, model: Socket | Output | None = None) -> Node:
    """The reference, scaled to what the model was made for."""
    return box.add("ADCaptureReferenceAttention", model=model or wires.model, image=image, vae=wires.vae,
                   conditioning=text, at_least=(WIDE, 0))  # fmt: skip


def empty_latent(box: Box, width: int, height: int) -> Node:
    """The size of the new picture, set on the box."""
    return box.add("EmptyLatentImage", width=box.setting("width", width), height=box.setting("height", height))


WIDE = 330


def texture_sampler(box: Box, model: Socket | Output, text: Output, style: Output, *, iterations: int = 3,
                    windows: Output | None = None, width: int = 512, height: int = 512) -> Node:  # fmt: skip
    """Sampling with an empty prompt, as the paper makes textures."""
    strength, steps = box.setting("style strength", 0.05), box.setting("steps", 50)
    pulls = box.setting("pulls per step", iterations)
    latent = empty_latent(box, width, height)
    more = {"windows": windows} if windows else {}
    return box.add("ADGuidedKSampler", model=model, positive=text, negative=text, latent_image=latent["LATENT"],
                   style=style, seed=box.setting("seed", 0), steps=steps, cfg=1.0, **PAPER, learning_rate=strength,
                   iterations=pulls, adain=False, at_least=(WIDE, 0), **more)  # fmt: skip


def texture(info: dict[str, Any]) -> Box:
    """The plain texture."""
    box = Box(info, "Texture from a Picture", "Makes a new picture with the texture of yours: the same colours, "
              "strokes and patches, in another arrangement. For SD 1.5 as it is; for SDXL and FLUX set width and "
              "height to 1024.", TEXTURE_ALIASES)  # fmt: skip
    wires = checkpoint(box)
    reference = picture(box, "reference", "your picture", "texture: scales")
    empty = empty_prompt(box, wires.clip)
    style = capture(box, wires, reference["IMAGE"], empty["CONDITIONING"])
    sampler = texture_sampler(box, wires.model, empty["CONDITIONING"], style["reference"])
    decode = box.add("VAEDecode", samples=sampler["LATENT"], vae=wires.vae)
    box.gives(picture=decode["IMAGE"], reference=reference["IMAGE"])
    latent = latent_of(sampler)
    box.arrange([empty, reference, latent], [style], [sampler], [decode])
    return box


def latent_of(sampler: Node) -> Node:
    """The node that a sampler's latent comes from."""
    return sampler.inputs["latent_image"].node


def large_texture(info: dict[str, Any]) -> Box:
    """A texture in windows."""
    box = Box(info, "Large Texture", "Makes a texture larger than the model's own size, window by window and without "
              "seams. For SD 1.5 as it is; for SDXL set window to 1024, and width and height larger than that.",
              ["large texture", "tiled diffusion", *TEXTURE_ALIASES])  # fmt: skip
    wires = checkpoint(box)
    reference = picture(box, "reference", "your picture", "texture: scales")
    empty = empty_prompt(box, wires.clip)
    style = capture(box, wires, reference["IMAGE"], empty["CONDITIONING"])
    windows = box.add("ADWindows", size=512, stride=64)
    sampler = texture_sampler(box, wires.model, empty["CONDITIONING"], style["reference"], iterations=2,
                              windows=windows["windows"], width=1024, height=512)  # fmt: skip
    windows.inputs |= {"size": box.setting("window", 512), "stride": box.setting("window step", 64)}
    decode = box.add("VAEDecode", samples=sampler["LATENT"], vae=wires.vae)
    box.gives(picture=decode["IMAGE"], reference=reference["IMAGE"])
    box.arrange([empty, reference, latent_of(sampler)], [style, windows], [sampler], [decode])
    return box


def seamless_tile(info: dict[str, Any]) -> Box:
    """A texture that repeats."""
    box = Box(info, "Seamless Tile", "Makes a texture that repeats without a seam, and shows it repeated. For SD 1.5 "
              "as it is; for SDXL set width and height to 1024.",
              ["seamless texture", "tileable texture", "pattern", *TEXTURE_ALIASES])  # fmt: skip
    wires = checkpoint(box)
    reference = picture(box, "reference", "your picture", "texture: scales")
    empty = empty_prompt(box, wires.clip)
    style = capture(box, wires, reference["IMAGE"], empty["CONDITIONING"])
    tiling = box.add("ADSeamlessTiling", model=wires.model, vae=wires.vae)
    sampler = texture_sampler(box, tiling["MODEL"], empty["CONDITIONING"], style["reference"])
    tiling.inputs["axes"] = box.setting("repeats in", "both")
    decode = box.add("VAEDecode", samples=sampler["LATENT"], vae=tiling["VAE"])
    across = box.add("ImageStitch", title="Twice across", image1=decode["IMAGE"], image2=decode["IMAGE"])
    down = box.add("ImageStitch", title="Twice down", image1=across["IMAGE"], image2=across["IMAGE"], direction="down")
    box.gives(tile=decode["IMAGE"], repeated=down["IMAGE"], reference=reference["IMAGE"])
    box.arrange([tiling, empty, reference], [style, latent_of(sampler)], [sampler], [decode], [across, down])
    return box


def coarse_to_fine(info: dict[str, Any]) -> Box:
    """A texture made small first and doubled twice."""
    box = Box(info, "Coarse to Fine", "Makes a texture small first, so that large shapes come right, and doubles it "
              "twice: each doubling adds detail. The edges of the picture fit together. For SD 1.5.",
              ["hires fix", "upscale", *TEXTURE_ALIASES])  # fmt: skip
    wires = checkpoint(box)
    reference = picture(box, "reference", "your picture", "texture: scales")
    first, later = box.setting("style strength, first", 0.1), box.setting("style strength, later", 0.05)
    anew, size, seed = box.setting("made anew", 0.4), box.setting("size", 1024), box.setting("seed", 0)
    whole = box.add("PrimitiveInt", title="Size", value=size)
    half, quarter = (
        box.add(
            "ComfyMathExpression",
            title=title,
            expression=f"a / {part}",
            at_least=(260, 0),
            **{"values.a": whole["INT"]},
        )
        for title, part in (("Half the size", 2), ("A quarter of the size", 4))
    )
    tiling = box.add("ADSeamlessTiling", model=wires.model, vae=wires.vae, axes="both")
    empty = empty_prompt(box, wires.clip)
    solid = box.add("SolidMask", value=1.0, width=1024, height=1024)
    mask = box.add("FeatherMask", title="All but its border", mask=solid["MASK"], left=128, top=128, right=128,
                   bottom=128)  # fmt: skip
    sides = (quarter["INT"], half["INT"], whole["INT"])
    columns, samplers = [], []
    # What is wrong in the large stays so: most work goes into the small picture, where it is cheap. Strength falls only
    # in the last stage, which leaves no noise.
    stages = (
        (20, 1.0, first, 16, True, "constant"),
        (12, anew, later, 10, False, "constant"),
        (8, anew, later, 7, False, "linear"),
    )
    for side, (steps, denoise, strength, iterations, adain, schedule) in zip(sides, stages, strict=True):
        scaled = box.add("ImageScale", image=reference["IMAGE"], upscale_method="lanczos", width=side, height=side,
                         crop="center")  # fmt: skip
        encoded = box.add("VAEEncode", pixels=scaled["IMAGE"], vae=tiling["VAE"])
        style = box.add("ADCaptureReferenceAttention", model=tiling["MODEL"], latent=encoded["LATENT"],
                        mask=mask["MASK"], conditioning=empty["CONDITIONING"])  # fmt: skip
        if samplers:
            start = box.add("LatentUpscale", samples=samplers[-1]["LATENT"], upscale_method="bicubic", width=side,
                            height=side)  # fmt: skip
        else:
            start = box.add("EmptyLatentImage", width=side, height=side)
        sampler = box.add("ADGuidedKSampler", model=tiling["MODEL"], positive=empty["CONDITIONING"],
                          negative=empty["CONDITIONING"], latent_image=start["LATENT"], style=style["reference"],
                          seed=seed, steps=steps, cfg=1.0, sampler_name="euler", scheduler="karras", denoise=denoise,
                          learning_rate=strength, iterations=iterations, adain=adain, lr_schedule=schedule,
                          at_least=(WIDE, 0))  # fmt: skip
        columns += [[start, scaled, encoded, style], [sampler]]
        samplers.append(sampler)
    decode = box.add("VAEDecode", samples=samplers[-1]["LATENT"], vae=tiling["VAE"])
    box.gives(picture=decode["IMAGE"], reference=reference["IMAGE"])
    box.arrange([tiling, empty, reference, whole], [quarter, half, solid, mask], *columns, [decode])
    return box


def style_prompts(box: Box, clip: Socket, prompt: Socket) -> tuple[Node, Node, Node, Node]:
    """Prompt and empty prompt with FLUX's guidance, and the negative prompt."""
    positive = box.add("CLIPTextEncode", title="Prompt", clip=clip, text=prompt, at_least=(WIDE, 120))
    negative = box.add("CLIPTextEncode", title="Negative prompt", clip=clip, text=NEGATIVE, at_least=(WIDE, 120))
    empty = empty_prompt(box, clip)
    follows = box.add("FluxGuidance", title="Guidance of the prompt (FLUX)", conditioning=positive["CONDITIONING"],
                      guidance=OF_PROMPT)  # fmt: skip
    reads = box.add("FluxGuidance", title="Guidance of the empty prompt (FLUX)", conditioning=empty["CONDITIONING"],
                    guidance=OF_EMPTY_PROMPT)  # fmt: skip
    box.columns = [[positive, negative, empty], [follows, reads]]
    return follows, negative, reads, positive


def style_from_picture(info: dict[str, Any], iterations: int = 3, flux: bool = False) -> Box:
    """A prompt in a style; FLUX has a scheduler of its own, and a shift that goes with the size."""
    box = Box(info, "Style from a Picture", "Shows what the prompt says, with the colours and the brush of your "
              "picture. For SD 1.5 as it is; SDXL: width and height 1024, follow the prompt 7; FLUX: style strength "
              "0.01, follow the prompt 1.", ["style of a picture", "ipadapter", *ALIASES])  # fmt: skip
    wires = checkpoint(box)
    reference = picture(box, "style", "your picture", "style: brush strokes")
    prompt = box.setting("prompt", "a lighthouse on a cliff above the sea, sailing boats")
    strength, colours = box.setting("style strength", 0.015), box.setting("take its colours", True)
    cfg, steps = box.setting("follow the prompt", 7.5), box.setting("steps", 50)
    latent = empty_latent(box, 512, 512)
    positive, negative, empty, _ = style_prompts(box, wires.clip, prompt)
    style = capture(box, wires, reference["IMAGE"], empty["CONDITIONING"])
    sampler = box.add("ADGuidedKSampler", model=wires.model, positive=positive["CONDITIONING"],
                      negative=negative["CONDITIONING"], latent_image=latent["LATENT"], style=style["reference"],
                      seed=box.setting("seed", 0), steps=steps, cfg=cfg, **PAPER, learning_rate=strength,
                      iterations=iterations, adain=colours, at_least=(WIDE, 0))  # fmt: skip
    shift = []
    if flux:
        shift = [box.add("ModelSamplingFlux", model=wires.model, **latent.inputs)]
        sampler.inputs |= {"model": shift[0]["MODEL"], "scheduler": "simple"}
    decode = box.add("VAEDecode", samples=sampler["LATENT"], vae=wires.vae)
    box.gives(picture=decode["IMAGE"], reference=reference["IMAGE"])
    texts, guidances = box.columns
    box.arrange([*texts, reference], [*guidances, latent, *shift], [style], [sampler], [decode])
    return box


class Photo(NamedTuple):
    """The part of a box that takes a photo and a style for it."""

    wires: Wires
    photo: Node
    style: Node
    empty: Node
    scaled: Node
    latent: Node
    content: Node
    strength: Socket
    structure: Socket
    colours: Socket
    steps: Socket


def photo_and_style(box: Box, keep_colours: float) -> Photo:
    """Both pictures, their settings, and the photo's structure."""
    wires = checkpoint(box)
    photo = picture(box, "photo", "your photo", "scene: still life", "or an example photo")
    style = picture(box, "style", "your style", "style: brush strokes", "or an example style")
    strength, structure = box.setting("style strength", 0.05), box.setting("keep structure", 0.25)
    colours, steps = box.setting("keep colours", keep_colours), box.setting("steps", 200)
    empty = empty_prompt(box, wires.clip)
    scaled = box.add("ImageScaleToTotalPixels", image=photo["IMAGE"], upscale_method="lanczos",
                     megapixels=box.setting("megapixels", 0.25), resolution_steps=64)  # fmt: skip
    latent = box.add("VAEEncode", pixels=scaled["IMAGE"], vae=wires.vae)
    content = box.add("ADCaptureReferenceAttention", title="Structure of the photo", model=wires.model,
                      latent=latent["LATENT"], conditioning=empty["CONDITIONING"], at_least=(WIDE, 0))  # fmt: skip
    return Photo(wires, photo, style, empty, scaled, latent, content, strength, structure, colours, steps)


def painted(box: Box, given: Photo, style_picture: Output) -> tuple[Node, Node]:
    """The photo, changed until its attention matches a style's: nodes that capture the style, and that optimise."""
    style = capture(box, given.wires, style_picture, given.empty["CONDITIONING"])
    optimise = box.add("ADOptimizeLatent", model=given.wires.model, style=style["reference"],
                       latent_image=given.latent["LATENT"], start_from="latent", steps=given.steps,
                       learning_rate=given.strength, iterations=1, content_weight=given.structure,
                       content=given.content["reference"], conditioning=given.empty["CONDITIONING"],
                       at_least=(WIDE, 0))  # fmt: skip
    return style, optimise


def photo_in_style(info: dict[str, Any]) -> Box:
    """A photo, changed until its attention matches the style's."""
    box = Box(info, "Photo in a Style", "Keeps what your photo shows, and gives it the colours and the brush of your "
              "style. For SD 1.5 as it is; for SDXL and FLUX set megapixels to 1.",
              ["photo to painting", "appearance transfer", *ALIASES])  # fmt: skip
    given = photo_and_style(box, keep_colours=0.0)
    style, optimise = painted(box, given, given.style["IMAGE"])
    toned = box.add("ADAdaINLatent", title="Colours of the photo", latent=optimise["LATENT"],
                    reference=given.latent["LATENT"], strength=given.colours)  # fmt: skip
    decode = box.add("VAEDecode", samples=toned["LATENT"], vae=given.wires.vae)
    box.gives(picture=decode["IMAGE"], photo=given.photo["IMAGE"], style=given.style["IMAGE"])
    box.arrange([given.empty, given.photo, given.style], [given.scaled, given.latent], [given.content, style],
                [optimise], [toned, decode])  # fmt: skip
    return box


def own_colours(info: dict[str, Any]) -> Box:
    """A photo in a style, whose colours are kept: the style is recoloured before, and the result after.

    Both as in Gatys et al., "Preserving color in neural artistic style transfer": the photo's palette for the style,
    and the photo's chroma below the result's luminance.
    """
    box = Box(info, "Style without its Colours", "Gives your photo the brush of your style, and keeps the photo's own "
              "colours. For SD 1.5 as it is; for SDXL and FLUX set megapixels to 1.",
              ["keep colours", "luminance only", "color preserving style transfer", *ALIASES])  # fmt: skip
    given = photo_and_style(box, keep_colours=1.0)
    recoloured = box.add("ColorTransfer", title="The style in the photo's colours", image_target=given.style["IMAGE"],
                         image_ref=given.scaled["IMAGE"], method=PALETTE)  # fmt: skip
    style, optimise = painted(box, given, recoloured["image"])
    decode = box.add("VAEDecode", samples=optimise["LATENT"], vae=given.wires.vae)
    split, joined, mixed = exchanged(box, light=decode["IMAGE"], colours=given.scaled["IMAGE"])
    mixed.inputs |= {"image1": decode["IMAGE"], "image2": joined["IMAGE"], "blend_factor": given.colours}
    box.gives(picture=mixed["IMAGE"], photo=given.photo["IMAGE"], style=given.style["IMAGE"])
    box.arrange([given.empty, given.photo, given.style], [given.scaled, given.latent, recoloured],
                [given.content, style], [optimise], [decode, *split], [joined, mixed])  # fmt: skip
    return box


PALETTE = "mkl_lab"
"""Of ComfyUI's ways to transfer colours the one that takes over how colours go together, not only each by itself."""


def exchanged(box: Box, light: Output, colours: Output) -> tuple[list[Node], Node, Node]:
    """The light of one picture with the colours of another of its size: nodes that split, that join, and that mix."""
    split = [box.add("ImageRGBToYUV", title=title, image=image)
             for title, image in (("Light", light), ("Colours", colours))]  # fmt: skip
    joined = box.add("ImageYUVToRGB", title="Light and colours", Y=split[0]["Y"], U=split[1]["U"], V=split[1]["V"])
    return split, joined, box.add("ImageBlend", title="How far", blend_mode="normal")


def palette(info: dict[str, Any]) -> Box:
    """Only the palette of a style: no model has a part in it."""
    box = Box(info, "Palette from a Picture", "Gives your photo the colours of your style, and nothing else of it: "
              "shapes, brush and light stay the photo's. Needs no model, and takes a moment.",
              ["color transfer", "color match", "color grading", "palette", *ALIASES])  # fmt: skip
    photo = picture(box, "photo", "your photo", "scene: still life", "or an example photo")
    style_picture = picture(box, "style", "your style", "style: watercolour", "or an example style")
    strength, light = box.setting("palette strength", 1.0), box.setting("keep light", 1.0)
    how = box.setting("how", PALETTE)
    recoloured = box.add("ColorTransfer", title="The photo in the style's colours", image_target=photo["IMAGE"],
                         image_ref=style_picture["IMAGE"], method=how, strength=strength)  # fmt: skip
    split, joined, mixed = exchanged(box, light=photo["IMAGE"], colours=recoloured["image"])
    mixed.inputs |= {"image1": recoloured["image"], "image2": joined["IMAGE"], "blend_factor": light}
    box.gives(picture=mixed["IMAGE"], photo=photo["IMAGE"], style=style_picture["IMAGE"])
    box.arrange([photo, style_picture], [recoloured], split, [joined, mixed])
    return box


def texture_by_optimisation(info: dict[str, Any]) -> Box:
    """A texture without sampling."""
    box = Box(info, "Texture by Optimisation", "Makes a texture without sampling: noise is changed until its attention "
              "matches that of your picture.", TEXTURE_ALIASES)  # fmt: skip
    wires = checkpoint(box)
    reference = picture(box, "reference", "your picture", "texture: scales")
    strength, steps = box.setting("style strength", 0.05), box.setting("steps", 300)
    ending = box.setting("how it ends", "constant")
    empty = empty_prompt(box, wires.clip)
    style = capture(box, wires, reference["IMAGE"], empty["CONDITIONING"])
    latent = empty_latent(box, 512, 512)
    optimise = box.add("ADOptimizeLatent", model=wires.model, style=style["reference"], latent_image=latent["LATENT"],
                       seed=box.setting("seed", 0), start_from="noise", steps=steps, learning_rate=strength,
                       iterations=1, lr_schedule=ending, conditioning=empty["CONDITIONING"],
                       at_least=(WIDE, 0))  # fmt: skip
    decode = box.add("VAEDecode", samples=optimise["LATENT"], vae=wires.vae)
    box.gives(picture=decode["IMAGE"], reference=reference["IMAGE"])
    box.arrange([empty, reference, latent], [style], [optimise], [decode])
    return box


def two_textures(info: dict[str, Any]) -> Box:
    """Two textures of one picture, each in its place."""
    box = Box(info, "Two Textures by Labels", "Takes the texture of each part of the new picture from the part of "
              "yours that has the same colour in the labels.", ["regions", "mask", *TEXTURE_ALIASES])  # fmt: skip
    wires = checkpoint(box)
    reference = picture(box, "reference", "your picture", "texture: two")
    labels = picture(box, "labels", "its labels", "labels: halves", "or example labels")
    target = picture(box, "map", "map of the new picture", "labels: disc", "or an example map")
    empty = empty_prompt(box, wires.clip)
    style = capture(box, wires, reference["IMAGE"], empty["CONDITIONING"])
    regions = box.add("ADRegions", reference_labels=labels["IMAGE"], target_labels=target["IMAGE"])
    sampler = texture_sampler(box, wires.model, empty["CONDITIONING"], style["reference"])
    sampler.inputs["regions"] = regions["regions"]
    decode = box.add("VAEDecode", samples=sampler["LATENT"], vae=wires.vae)
    box.gives(picture=decode["IMAGE"], reference=reference["IMAGE"], map=target["IMAGE"])
    box.arrange([empty, reference, labels, target], [style, regions, latent_of(sampler)], [sampler], [decode])
    return box


def style_with_controlnet(info: dict[str, Any]) -> Box:
    """The outlines of a picture, the style of another."""
    box = Box(info, "Style with ControlNet", "Keeps the outlines of your picture; the prompt says what they show, and "
              "your style gives colours and brush.", ["controlnet", "canny", *ALIASES])  # fmt: skip
    wires = checkpoint(box)
    net = box.wire("control_net", "CONTROL_NET")
    outlined = picture(box, "picture", "your picture", "scene: still life", "or an example")
    style_picture = picture(box, "style", "your style", "style: brush strokes", "or an example style")
    prompt = box.setting("prompt", "fruit and a jug on a table")
    strength, outlines = box.setting("style strength", 0.015), box.setting("keep outlines", 1.0)
    cfg, steps, seed = box.setting("follow the prompt", 7.5), box.setting("steps", 50), box.setting("seed", 0)
    positive = box.add("CLIPTextEncode", title="Prompt", clip=wires.clip, text=prompt, at_least=(WIDE, 120))
    negative = box.add("CLIPTextEncode", title="Negative prompt", clip=wires.clip, text=NEGATIVE, at_least=(WIDE, 120))
    empty = empty_prompt(box, wires.clip)
    scaled = box.add("ImageScaleToTotalPixels", image=outlined["IMAGE"], upscale_method="lanczos", megapixels=0.25,
                     resolution_steps=64)  # fmt: skip
    edges = box.add("Canny", image=scaled["IMAGE"], low_threshold=0.2, high_threshold=0.5)
    size = box.add("GetImageSize", image=scaled["IMAGE"])
    latent = box.add("EmptyLatentImage", title="As large as the picture", width=size["width"], height=size["height"])
    control = box.add("ControlNetApplyAdvanced", positive=positive["CONDITIONING"],
                      negative=negative["CONDITIONING"], control_net=net, image=edges["IMAGE"], vae=wires.vae,
                      strength=outlines)  # fmt: skip
    style = capture(box, wires, style_picture["IMAGE"], empty["CONDITIONING"])
    guided = box.add("ADApplyGuidance", model=wires.model, style=style["reference"], learning_rate=strength,
                     iterations=3, adain=True, at_least=(WIDE, 0))  # fmt: skip
    sampler = box.add("KSampler", model=guided["MODEL"], positive=control["positive"], negative=control["negative"],
                      latent_image=latent["LATENT"], seed=seed, steps=steps, cfg=cfg, **PAPER)  # fmt: skip
    decode = box.add("VAEDecode", samples=sampler["LATENT"], vae=wires.vae)
    box.gives(picture=decode["IMAGE"], outlines=edges["IMAGE"], style=style_picture["IMAGE"])
    box.arrange([positive, negative, empty, outlined, style_picture], [scaled, edges, style],
                [control, guided, size, latent], [sampler], [decode])  # fmt: skip
    return box


def example_mask(info: dict[str, Any]) -> Box:
    """A mask to start with."""
    box = Box(info, "Example Mask", "A mask out of the example labels: what is white is painted.")
    labels = box.add("ADExampleReference", picture=box.setting("white of", "labels: disc"))
    mask = box.add("ImageToMask", image=labels["IMAGE"], channel="red")
    box.gives(mask=mask["MASK"])
    box.arrange([labels], [mask])
    return box


def paint_in_style(info: dict[str, Any]) -> Box:
    """Inpainting."""
    box = Box(info, "Paint in a Style", "Makes a part of your picture anew, in the style of another. Every other pixel "
              "stays as it was.", ["inpainting", "inpaint", *ALIASES])  # fmt: skip
    wires = checkpoint(box)
    mask = box.wire("mask", "MASK", "part to paint")
    painted = picture(box, "picture", "your picture", "scene: still life", "or an example")
    style_picture = picture(box, "style", "your style", "style: brush strokes", "or an example style")
    prompt = box.setting("prompt", "a bunch of sunflowers")
    strength, anew = box.setting("style strength", 0.015), box.setting("made anew", 0.8)
    cfg, steps, seed = box.setting("follow the prompt", 7.5), box.setting("steps", 50), box.setting("seed", 0)
    positive = box.add("CLIPTextEncode", title="Prompt", clip=wires.clip, text=prompt, at_least=(WIDE, 120))
    negative = box.add("CLIPTextEncode", title="Negative prompt", clip=wires.clip, text=NEGATIVE, at_least=(WIDE, 120))
    empty = empty_prompt(box, wires.clip)
    scaled = box.add("ImageScaleToTotalPixels", image=painted["IMAGE"], upscale_method="lanczos", megapixels=0.25,
                     resolution_steps=64)  # fmt: skip
    encoded = box.add("VAEEncode", pixels=scaled["IMAGE"], vae=wires.vae)
    latent = box.add("SetLatentNoiseMask", samples=encoded["LATENT"], mask=mask)
    style = capture(box, wires, style_picture["IMAGE"], empty["CONDITIONING"])
    sampler = box.add("ADGuidedKSampler", model=wires.model, positive=positive["CONDITIONING"],
                      negative=negative["CONDITIONING"], latent_image=latent["LATENT"], style=style["reference"],
                      seed=seed, steps=steps, cfg=cfg, **PAPER, denoise=anew, learning_rate=strength, iterations=3,
                      adain=True, at_least=(WIDE, 0))  # fmt: skip
    decode = box.add("VAEDecode", samples=sampler["LATENT"], vae=wires.vae)
    result = box.add("ImageCompositeMasked", title="Put the new part into the picture", destination=painted["IMAGE"],
                     source=decode["IMAGE"], mask=mask, x=0, y=0, resize_source=True)  # fmt: skip
    box.gives(picture=result["IMAGE"], before=painted["IMAGE"], style=style_picture["IMAGE"])
    box.arrange([positive, negative, empty, painted, style_picture], [scaled, encoded, latent], [style], [sampler],
                [decode, result])  # fmt: skip
    return box


def sharper_decoding(info: dict[str, Any]) -> Box:
    """A texture, decoded twice."""
    box = Box(info, "Texture, Decoded Sharper", "Makes a texture, and decodes it plainly and with a decoder that was "
              "trained on your picture for a moment.", ["vae", "detail", *TEXTURE_ALIASES])  # fmt: skip
    wires = checkpoint(box)
    reference = picture(box, "reference", "your picture", "texture: scales")
    training, rate = box.setting("training steps", 75), box.setting("training rate", 0.0001)
    empty = empty_prompt(box, wires.clip)
    style = capture(box, wires, reference["IMAGE"], empty["CONDITIONING"])
    sampler = texture_sampler(box, wires.model, empty["CONDITIONING"], style["reference"])
    tuned = box.add("ADFinetuneVAEDecoder", vae=wires.vae, image=reference["IMAGE"], steps=training, learning_rate=rate)
    sharper = box.add("VAEDecode", title="Sharper decoding", samples=sampler["LATENT"], vae=tuned["VAE"])
    plain = box.add("VAEDecode", title="Plain decoding", samples=sampler["LATENT"], vae=wires.vae)
    box.gives(sharper=sharper["IMAGE"], plain=plain["IMAGE"], reference=reference["IMAGE"])
    box.arrange([empty, reference, latent_of(sampler)], [style, tuned], [sampler], [plain, sharper])
    return box


def attention_map(info: dict[str, Any]) -> Box:
    """A texture, and where each place of it takes its look from."""
    box = Box(info, "Texture with its Attention Map", "Makes a texture, and shows where in your picture each place of "
              "it takes its look from.", ["attention map", "correspondence", *TEXTURE_ALIASES])  # fmt: skip
    wires = checkpoint(box)
    reference = picture(box, "reference", "your picture", "texture: two")
    carried = picture(box, "labels", "picture to carry over", "labels: halves", "or an example to carry")
    layer = box.setting("layer", "mean")
    empty = empty_prompt(box, wires.clip)
    style = capture(box, wires, reference["IMAGE"], empty["CONDITIONING"])
    sampler = texture_sampler(box, wires.model, empty["CONDITIONING"], style["reference"])
    decode = box.add("VAEDecode", samples=sampler["LATENT"], vae=wires.vae)
    shown = box.add("ADAttentionMap", model=wires.model, style=style["reference"], latent=sampler["LATENT"],
                    conditioning=empty["CONDITIONING"], layer=layer, image=carried["IMAGE"])  # fmt: skip
    box.gives(picture=decode["IMAGE"], map=shown["map"], carried=shown["carried"])
    box.arrange([empty, reference, carried, latent_of(sampler)], [style], [sampler], [decode, shown])
    return box


BLUEPRINTS = [texture, style_from_picture, photo_in_style, own_colours, palette, large_texture, seamless_tile,
              coarse_to_fine]  # fmt: skip
"""Those in the node library; the others belong to one template each."""

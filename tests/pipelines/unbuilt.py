"""Pipeline classes of diffusers that are not counted or cannot be followed, and why."""

#: They run, and their loop makes it impossible to skip steps: enabling and calibrating say so.
REFUSED = {
    "SkyReelsV2DiffusionForcingPipeline": "every frame has its own step, on a copy of the scheduler",
    "SkyReelsV2DiffusionForcingImageToVideoPipeline": "every frame has its own step, on a copy of the scheduler",
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline": "every frame has its own step, on a copy of the scheduler",
    "StableDiffusionSAGPipeline": "it reads attention inside the UNet at every step",
    "KarrasVePipeline": "its scheduler corrects every step by a second call, by a method of its own",
    "ScoreSdeVePipeline": "its scheduler corrects every step by a second call, by a method of its own",
    "StableDiffusionAttendAndExcitePipeline": "it reads attention inside the UNet, and gradients, at every step",
    "StableDiffusionParadigmsPipeline": "it takes many steps at once, again and again until they agree",
    "TextToVideoZeroPipeline": "its frames go through parts of the loop several times, on copies of the scheduler",
    "TextToVideoZeroSDXLPipeline": "its frames go through parts of the loop several times, on copies of the scheduler",
    "RePaintPipeline": "its loop goes back to noisier steps again and again",
}

#: Their samples are tokens, which no scheduler moves by multiples of what it is given. The sampler's cost cannot be
#: measured; the message says to plan by the paper's.
PLANNED_BY_THE_PAPER = ("AmusedPipeline", "AmusedImg2ImgPipeline", "AmusedInpaintPipeline")

_NO_LOOP = "no sampling loop: one call of a network"
_TEXT = "it makes text, by a language model that fills in tokens"
_BASE = "base class"
_FAULT = "it does not run in this version of diffusers: "

#: No small pipeline of these is built.
NOT_BUILT = {
    "DiffusionPipeline": _BASE,
    "DiffusionGemmaPipeline": _TEXT,
    "LLaDA2Pipeline": _TEXT,
    "EasyAnimateControlPipeline": _FAULT + "it calls its own encode_prompt with arguments that are not there",
    "FluxPriorReduxPipeline": _NO_LOOP,
    "LTXLatentUpsamplePipeline": _NO_LOOP,
    "LTX2LatentUpsamplePipeline": _NO_LOOP,
    "LTX2VideoDiffusionDecodePipeline": _NO_LOOP,
    "SanaWMLTX2Refiner": "a part of SanaWMPipeline",
}

"""The families purelm knows, by the `model_type` of their config.json."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

from ..errors import ConfigError
from ..nn.spec import ModelSpec
from .config_fields import Fields
from .names import Names
from .rope_config import check_frequencies


@dataclass(frozen=True)
class Family:
    """How one model_type is read, by the module of that name in families/, and its class in
    transformers.

    chosen: the names of one model, where the module has a `names_of` that tells them by the spec.
    """

    model_type: str
    hf_class: str
    chosen: Names | None = None

    @property
    def module(self) -> Any:
        """What has `spec` and `NAMES`; imported when first asked for."""
        return import_module(f".families.{self.model_type}", __package__)

    @property
    def names(self) -> Names:
        names: Names = self.chosen or self.module.NAMES
        return names

    def of(self, spec: ModelSpec) -> "Family":
        """The family with the names that its class has in a model like `spec`."""
        names_of = getattr(self.module, "names_of", None)
        return self if names_of is None else replace(self, chosen=names_of(spec))

    def spec(self, config: Mapping[str, Any], file: object = None) -> ModelSpec:
        """The `ModelSpec` of a config's fields; raises ConfigError for what it does not cover."""
        fields = Fields(config, file)
        spec: ModelSpec = self.module.spec(fields)
        fields.finish()
        check_frequencies(fields, spec.ropes())
        return spec


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "LlamaForCausalLM"),
        Family("mistral", "MistralForCausalLM"),
        Family("qwen2", "Qwen2ForCausalLM"),
        Family("qwen3", "Qwen3ForCausalLM"),
        Family("gemma", "GemmaForCausalLM"),
        Family("gemma2", "Gemma2ForCausalLM"),
        Family("gemma3_text", "Gemma3ForCausalLM"),
        Family("gemma4_text", "Gemma4ForCausalLM"),
        Family("granite", "GraniteForCausalLM"),
        Family("smollm3", "SmolLM3ForCausalLM"),
        Family("phi3", "Phi3ForCausalLM"),
        Family("olmo2", "Olmo2ForCausalLM"),
        Family("cohere", "CohereForCausalLM"),
        Family("cohere2", "Cohere2ForCausalLM"),
        Family("olmo3", "Olmo3ForCausalLM"),
        Family("exaone4", "Exaone4ForCausalLM"),
        Family("ministral", "MinistralForCausalLM"),
        Family("ernie4_5", "Ernie4_5ForCausalLM"),
        Family("helium", "HeliumForCausalLM"),
        Family("glm", "GlmForCausalLM"),
        Family("glm4", "Glm4ForCausalLM"),
        Family("stablelm", "StableLmForCausalLM"),
        Family("arcee", "ArceeForCausalLM"),
        Family("nemotron", "NemotronForCausalLM"),
        Family("mixtral", "MixtralForCausalLM"),
        Family("qwen3_moe", "Qwen3MoeForCausalLM"),
        Family("qwen2_moe", "Qwen2MoeForCausalLM"),
        Family("olmoe", "OlmoeForCausalLM"),
        Family("granitemoe", "GraniteMoeForCausalLM"),
        Family("glm4_moe", "Glm4MoeForCausalLM"),
        Family("starcoder2", "Starcoder2ForCausalLM"),
        Family("seed_oss", "SeedOssForCausalLM"),
        Family("olmo", "OlmoForCausalLM"),
        Family("hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM"),
        Family("gpt_neox", "GPTNeoXForCausalLM"),
        Family("phi", "PhiForCausalLM"),
        Family("deepseek_v3", "DeepseekV3ForCausalLM"),
        Family("deepseek_v2", "DeepseekV2ForCausalLM"),
        Family("glm4_moe_lite", "Glm4MoeLiteForCausalLM"),
        Family("dots1", "Dots1ForCausalLM"),
        Family("granitemoeshared", "GraniteMoeSharedForCausalLM"),
        Family("bamba", "BambaForCausalLM"),
        Family("lfm2_moe", "Lfm2MoeForCausalLM"),
        Family("llama4_text", "Llama4ForCausalLM"),
        Family("phimoe", "PhimoeForCausalLM"),
        Family("ministral3", "Ministral3ForCausalLM"),
        Family("falcon", "FalconForCausalLM"),
        Family("apertus", "ApertusForCausalLM"),
        Family("gpt2", "GPT2LMHeadModel"),
        Family("gpt_oss", "GptOssForCausalLM"),
        Family("lfm2", "Lfm2ForCausalLM"),
        Family("falcon_h1", "FalconH1ForCausalLM"),
        Family("granitemoehybrid", "GraniteMoeHybridForCausalLM"),
        Family("qwen3_next", "Qwen3NextForCausalLM"),
        Family("qwen3_5_text", "Qwen3_5ForCausalLM"),
        Family("qwen3_5_moe_text", "Qwen3_5MoeForCausalLM"),
    )
}


def family_of(config: Mapping[str, Any], file: object = None) -> Family:
    """The family of a config's `model_type`."""
    model_type = config.get("model_type")
    if model_type is None:
        raise ConfigError("the config has no model_type, so the architecture is unknown", file=file)
    known = isinstance(model_type, str) and model_type in FAMILIES
    if isinstance(model_type, str) and not known and config.get("vision_config") is not None:
        raise ConfigError(
            f"model_type {model_type!r:.200} is of a model that sees, of which purelm has the text "
            "half alone: load it with text_only=True",
            file=file,
        )
    if not known:
        raise ConfigError(
            f"model_type {model_type!r:.200} is not supported; known are {', '.join(FAMILIES)}",
            file=file,
        )
    return FAMILIES[model_type]

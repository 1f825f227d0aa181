"""The recommended configuration for each data set, whole; `key=value` overrides change single settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from genrecall.data.search_logs import PrepareDataConfig
from genrecall.encoders.contrastive import EncoderConfig
from genrecall.evaluation.evaluation_config import EvaluationConfig
from genrecall.generator.generator_config import GeneratorConfig, StageConfig
from genrecall.quantization.cq_sid import QuantizerConfig
from genrecall.ranking.ranker import RankerConfig
from genrecall.registry.bundle import BundleConfig
from genrecall.registry.promotion import RegistryConfig
from genrecall.rl.align_config import AlignConfig
from genrecall.sid.build import SidIndexConfig
from genrecall.train_worker import TrainSettings

MAIN_VARIANT = "cqsid"
"""The variant that is aligned, bundled and served; the others are baselines of the same size."""


def _without_category(config: QuantizerConfig) -> QuantizerConfig:
    """The ablation, with what then has no effect at its default."""
    return replace(config, use_category=False, min_items=QuantizerConfig.min_items, category_share=QuantizerConfig.category_share)


def _without_query(config: QuantizerConfig) -> QuantizerConfig:
    """The ablation, with what then has no effect at its default."""
    return replace(config, use_query=False, gamma=QuantizerConfig.gamma, temperature=QuantizerConfig.temperature)


def _rq_kmeans(config: QuantizerConfig) -> QuantizerConfig:
    """The control, which reads few of the settings."""
    return QuantizerConfig(
        seed=config.seed, method="rqkmeans", use_category=False, use_query=False, level_sizes=config.level_sizes, kmeans_iterations=config.kmeans_iterations
    )


VARIANTS: Mapping[str, Callable[[QuantizerConfig], QuantizerConfig]] = {
    "cqsid": lambda config: config,
    "rqvae": lambda config: _without_category(_without_query(config)),
    "rqvae_resized": lambda config: _without_category(_without_query(config)),
    "cqsid_without_category": _without_category,
    "cqsid_without_query": _without_query,
    "rqkmeans": _rq_kmeans,
}

RESIZED = "rqvae_resized"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything a run of the line needs.

    Attributes:
        name: folder under `GENRECALL_HOME`, and `genrecall-<name>` in the model registry unless `registry.model_name` says otherwise.
        variants: the SIDs to compare; `cqsid` is always among them.
        resized_levels: books of the variant `rqvae_resized`, RQ-VAE with clusters as large on average as CQ-SID's; None: this recipe has none.
        align: None leaves out the reinforcement learning.
    """

    name: str
    variants: tuple[str, ...] = ("cqsid", "rqvae")
    data: PrepareDataConfig
    encoder: EncoderConfig = EncoderConfig()  # noqa: RUF009 - frozen, as all below
    quantizer: QuantizerConfig = QuantizerConfig()  # noqa: RUF009
    resized_levels: tuple[int, int, int] | None = None
    sid: SidIndexConfig = SidIndexConfig()  # noqa: RUF009
    generator: GeneratorConfig = GeneratorConfig()  # noqa: RUF009
    ranker: RankerConfig = RankerConfig()  # noqa: RUF009
    align: AlignConfig | None = AlignConfig()  # noqa: RUF009
    evaluation: EvaluationConfig = EvaluationConfig()  # noqa: RUF009
    bundle: BundleConfig = BundleConfig()  # noqa: RUF009
    registry: RegistryConfig = RegistryConfig()  # noqa: RUF009
    train: TrainSettings = TrainSettings()  # noqa: RUF009

    def problems(self) -> list[str]:
        found = [f"variants: unknown {name!r}; known: {', '.join(VARIANTS)}" for name in self.variants if name not in VARIANTS]
        if MAIN_VARIANT not in self.variants:
            found.append(f"variants: must hold {MAIN_VARIANT!r}, the one that is served; got {self.variants}")
        if self.align is not None and self.align.support != self.generator.support:
            found.append(
                f"align.support: expected {self.generator.support!r}, the generator's (guided={str(self.generator.guided).lower()}), got {self.align.support!r}; "
                "samples, update and search must share one support"
            )
        if self.quantizer.kmeans_iterations != QuantizerConfig.kmeans_iterations and self.quantizer.method == "rqvae" and "rqkmeans" not in self.variants:
            found.append(f"quantizer.kmeans_iterations: has no effect without the variant 'rqkmeans'; leave it at {QuantizerConfig.kmeans_iterations}")
        if RESIZED in self.variants and self.resized_levels is None:
            found.append(f"variants: {RESIZED!r} needs resized_levels, the books that give RQ-VAE clusters as large as CQ-SID's")
        return found

    def quantizer_of(self, variant: str) -> QuantizerConfig:
        """The quantiser's config for one variant: the recipe's with that variant's switches."""
        config = VARIANTS[variant](self.quantizer)
        return config if variant != RESIZED or self.resized_levels is None else replace(config, level_sizes=self.resized_levels)

    @property
    def registered_name(self) -> str:
        """The name in the model registry."""
        return self.registry.model_name or f"genrecall-{self.name}"


ALL_VARIANTS = ("cqsid", "rqvae", "cqsid_without_category", "cqsid_without_query", "rqkmeans")


def marketplace() -> Recipe:
    """The built-in marketplace, small: what `make demo` runs."""
    return Recipe(name="marketplace", data=PrepareDataConfig(source="marketplace", marketplace_size="small"), quantizer=QuantizerConfig(level_sizes=(64, 8, 8)))


def tiny() -> Recipe:
    """The smallest run of the whole line, for tests and for trying a cluster; its numbers mean nothing."""
    return Recipe(
        name="tiny",
        data=PrepareDataConfig(source="marketplace", marketplace_size="tiny"),
        encoder=EncoderConfig(steps=40, batch_size=128, dim=32, hidden=64, num_buckets=4096),
        quantizer=QuantizerConfig(level_sizes=(24, 8, 8), min_items=5, steps=60, batch_size=128, latent_dim=16, hidden_dim=64),
        generator=GeneratorConfig(
            vocab_size=1024,
            hidden_size=64,
            num_layers=2,
            intermediate_size=128,
            guide_weight_steps=5,
            correct_spelling=True,
            stage1=StageConfig(steps=40, batch_size=64, learning_rate=3e-3, warmup_steps=5),
            stage2=StageConfig(steps=60, batch_size=64, learning_rate=2e-3, warmup_steps=5),
            stage3=StageConfig(steps=40, batch_size=64, learning_rate=1e-3, warmup_steps=5),
            validation_requests=50,
        ),
        ranker=RankerConfig(trees=20, min_rows_per_leaf=10),
        align=AlignConfig(steps=3, requests_per_step=16, warmup_steps=1),
        evaluation=EvaluationConfig(),
    )


def home_depot() -> Recipe:
    """Home Depot search relevance: 54,667 products, real queries with human judgements; no categories, no shoppers."""
    return Recipe(
        name="home_depot",
        data=PrepareDataConfig(source="home_depot"),
        encoder=EncoderConfig(objective="contrastive", category_fraction=0.0, dim=256, steps=1200),
        quantizer=QuantizerConfig(level_sizes=(256, 32, 32), use_category=False, steps=1000),
        generator=GeneratorConfig(
            vocab_size=8192,
            guide_lexical=8.0,
            guide_stemmer="english",
            guide_feedback=0.2,
            guide_weight_steps=100,
            correct_spelling=True,
            stage1=StageConfig(steps=100, batch_size=64, learning_rate=2e-3),
            stage2=StageConfig(steps=500, batch_size=64, learning_rate=2e-3),
        ),
    )


def amazon_scientific() -> Recipe:
    """Amazon Industrial & Scientific: 4,344 items, 58,492 purchases, queries derived from the items."""
    return Recipe(
        name="amazon_scientific",
        variants=ALL_VARIANTS,
        data=PrepareDataConfig(source="amazon_scientific"),
        encoder=EncoderConfig(steps=800),
        quantizer=QuantizerConfig(level_sizes=(256, 32, 32)),
        generator=GeneratorConfig(vocab_size=8192),
    )


def site() -> Recipe:
    """A site's own tables: set data.items, data.events and data.users (files, folders or globs of Parquet, JSONL or CSV)."""
    return Recipe(name="site", data=PrepareDataConfig(source="canonical"))


def ubi() -> Recipe:
    """User Behavior Insights logs (OpenSearch, Solr, Elasticsearch): set data.folder."""
    return Recipe(name="ubi", data=PrepareDataConfig(source="ubi"))


def paper() -> Recipe:
    """The sizes and the unguided generator of arXiv:2605.14434, for a cluster with GPUs: 2.1e7 items, codebooks 2048 x 1024 x 1024, Qwen2.5-0.5B."""
    return Recipe(
        name="paper",
        data=PrepareDataConfig(source="canonical", events_per_partition=2_000_000),
        encoder=EncoderConfig(backbone="Qwen/Qwen2.5-0.5B", dim=0, steps=20_000, batch_size=1024, learning_rate=2e-5),
        quantizer=QuantizerConfig(level_sizes=(2048, 1024, 1024), min_items=100, gamma=0.001, steps=200_000, batch_size=1024, latent_dim=256, hidden_dim=1024),
        generator=GeneratorConfig(
            base_model="Qwen2.5-0.5B",
            guided=False,
            stage1=StageConfig(steps=2000, batch_size=128, learning_rate=1e-4),
            stage2=StageConfig(steps=2500, batch_size=256, learning_rate=4e-5),
            stage3=StageConfig(steps=5000, batch_size=64, learning_rate=4e-5),
        ),
        align=AlignConfig(support="level", steps=1000, requests_per_step=64, learning_rate=1e-6, cpus_per_rollout=1.0, gpus_per_rollout=1.0, rollout_actors=4),
        train=TrainSettings(num_workers=8, cpus_per_worker=8, use_gpu=True),
    )


RECIPES: Mapping[str, Callable[[], Recipe]] = {recipe.__name__: recipe for recipe in (marketplace, tiny, home_depot, amazon_scientific, site, ubi, paper)}

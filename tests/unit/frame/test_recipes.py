"""Recipes: settings of different stages that must agree."""

from __future__ import annotations

import pytest

from genrecall.config import ConfigError, apply_overrides
from genrecall.recipes import RECIPES, VARIANTS


def test_all_stages_of_a_recipe_share_one_support() -> None:
    with pytest.raises(
        ConfigError, match=r"align\.support: expected 'trie', the generator's \(guided=true\), got 'level'; samples, update and search must share"
    ):
        apply_overrides(RECIPES["marketplace"](), ["align.support=level"])
    with pytest.raises(ConfigError, match=r"align\.support: expected 'level', the generator's \(guided=false\), got 'trie'"):
        apply_overrides(RECIPES["marketplace"](), ["generator.guided=false"])
    both = apply_overrides(RECIPES["marketplace"](), ["generator.guided=false", "align.support=level"])
    assert both.align is not None
    assert both.align.support == both.generator.support == "level"
    assert apply_overrides(RECIPES["marketplace"](), ["generator.guided=false", "align=none"]).align is None


def test_resized_books_are_asked_for_where_they_are_compared() -> None:
    variants = 'variants=["cqsid", "rqvae", "rqvae_resized"]'
    with pytest.raises(ConfigError, match="variants: 'rqvae_resized' needs resized_levels, the books that give RQ-VAE clusters as large as CQ-SID's"):
        apply_overrides(RECIPES["marketplace"](), [variants])
    recipe = apply_overrides(RECIPES["marketplace"](), [variants, "resized_levels=[64,6,6]"])
    books = {variant: recipe.quantizer_of(variant).level_sizes for variant in recipe.variants}
    assert books == {"cqsid": (64, 8, 8), "rqvae": (64, 8, 8), "rqvae_resized": (64, 6, 6)}


def test_variants_differ_in_their_constraints() -> None:
    recipe = RECIPES["marketplace"]()
    constraints = {variant: (config.use_category, config.use_query) for variant in VARIANTS if (config := recipe.quantizer_of(variant))}
    assert constraints.pop("cqsid") == (True, True)
    assert constraints.pop("cqsid_without_category") == (False, True)
    assert constraints.pop("cqsid_without_query") == (True, False)
    assert constraints == dict.fromkeys(("rqvae", "rqvae_resized", "rqkmeans"), (False, False))


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_variant_of_every_recipe_is_a_quantizer_without_idle_settings(recipe: str) -> None:
    made = RECIPES[recipe]()
    assert {variant: made.quantizer_of(variant).problems() for variant in VARIANTS} == {variant: [] for variant in VARIANTS}


def test_iterations_of_k_means_are_for_the_control() -> None:
    with pytest.raises(ConfigError, match=r"quantizer\.kmeans_iterations: has no effect without the variant 'rqkmeans'; leave it at 25"):
        apply_overrides(RECIPES["marketplace"](), ["quantizer.kmeans_iterations=50"])
    with_control = apply_overrides(RECIPES["marketplace"](), ["quantizer.kmeans_iterations=50", 'variants=["cqsid", "rqkmeans"]'])
    assert with_control.quantizer_of("rqkmeans").kmeans_iterations == 50


def test_all_problems_of_a_recipe_are_listed_together() -> None:
    with pytest.raises(ConfigError) as caught:
        apply_overrides(RECIPES["tiny"](), ['variants=["rqvae", "rqvea"]', "align.support=level", "generator.targets_per_query=0"])
    for part in (
        "variants: unknown 'rqvea'; known: cqsid, rqvae",
        "variants: must hold 'cqsid'",
        "align.support: expected 'trie'",
        "targets_per_query: must be",
    ):
        assert part in str(caught.value)

"""The line: every stage of a recipe, in order, each skipped where its artifact already matches.

    dataset -> encoder -> {variant}/quantizer -> {variant}/sid_index -> {variant}/generator -> ranker -> aligned -> evaluation -> bundle -> registry

Artifacts lie under `GENRECALL_HOME/<recipe name>/`. A stage alone (`jobs/train_encoder.py`) finds its inputs there.
"""

from __future__ import annotations

import genrecall.ray_environment  # noqa: F401 - before Ray

import argparse
import itertools
import json
import logging
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from typing import Any

import mlflow
import ray
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from genrecall.config import ConfigError, Places, apply_overrides, places, to_dict
from genrecall.data.catalog import load_catalog
from genrecall.data.interactions import load_requests
from genrecall.data.search_logs import prepare_data
from genrecall.encoders.contrastive import train_encoder
from genrecall.evaluation.offline import evaluate
from genrecall.evaluation.records import headline_metrics
from genrecall.generator.sft import train_generator
from genrecall.quantization.cq_sid import train_quantizer
from genrecall.ranking.ranker import train_ranker
from genrecall.recipes import MAIN_VARIANT, RECIPES, Recipe
from genrecall.registry.bundle import BundleError, build_bundle
from genrecall.registry.catalogue_log import CatalogueLog, log_folder
from genrecall.registry.promotion import aliases_of, current_champion, promote, register
from genrecall.registry.versions import RegistryError, Version, fetch_bundle, redacted, redacting
from genrecall.rl.eg_grpo import align_generator
from genrecall.sid.build import build_sid_index, churn_between
from genrecall.storage import Artifact, ArtifactError, open_artifact, read_manifest
from genrecall.tracking import stage_run, use_tracking
from genrecall.train_worker import fits_at_once

logger = logging.getLogger(__name__)


class Pipeline:
    """The stages of one recipe over one home folder.

    Args:
        recipe: all configs.
        where: home, data and tracking store.
        force: redo stages even where their artifacts match.
    """

    def __init__(self, recipe: Recipe, where: Places, *, force: bool = False) -> None:
        self.recipe = recipe
        self.where = where
        self.force = force
        self.root = f"{where.home}/{recipe.name}"
        self._total = 0
        self._started = itertools.count(1)
        self._parent_run_id: str | None = None

    def uri(self, name: str) -> str:
        """Where the artifact `name`, e.g. `encoder` or `cqsid/generator`, lies."""
        return f"{self.root}/{name}"

    def existing(self, name: str) -> Artifact:
        """An artifact that an earlier stage made.

        Raises:
            ArtifactError: it is not there or does not match its manifest.
        """
        return open_artifact(self.uri(name), kind=name.rpartition("/")[2])

    def dataset(self) -> Artifact:
        config = self.recipe.data
        return self._stage("dataset", config, lambda run: prepare_data(config, uri=self.uri("dataset"), data_root=self.where.data, force=self.force))

    def encoder(self) -> Artifact:
        config, dataset = self.recipe.encoder, self.existing("dataset")
        return self._stage(
            "encoder", config, lambda run: train_encoder(config, dataset=dataset, uri=self.uri("encoder"), train=self._train(run), force=self.force)
        )

    def quantizer(self, variant: str = MAIN_VARIANT) -> Artifact:
        name, config = f"{variant}/quantizer", self.recipe.quantizer_of(variant)
        inputs = {"dataset": self.existing("dataset"), "encoder": self.existing("encoder")}
        return self._stage(name, config, lambda run: train_quantizer(config, **inputs, uri=self.uri(name), train=self._train(run), force=self.force))

    def sid_index(self, variant: str = MAIN_VARIANT) -> Artifact:
        name, config = f"{variant}/sid_index", self.recipe.sid
        inputs = {"dataset": self.existing("dataset"), "encoder": self.existing("encoder"), "quantizer": self.existing(f"{variant}/quantizer")}
        return self._stage(name, config, lambda run: build_sid_index(config, **inputs, uri=self.uri(name), force=self.force))

    def generator(self, variant: str = MAIN_VARIANT) -> Artifact:
        name, config = f"{variant}/generator", self.recipe.generator
        inputs = {"dataset": self.existing("dataset"), "encoder": self.existing("encoder"), "sid_index": self.existing(f"{variant}/sid_index")}
        return self._stage(name, config, lambda run: train_generator(config, **inputs, uri=self.uri(name), train=self._train(run), force=self.force))

    def ranker(self) -> Artifact:
        config = self.recipe.ranker
        inputs = {"dataset": self.existing("dataset"), "encoder": self.existing("encoder")}
        return self._stage("ranker", config, lambda run: train_ranker(config, **inputs, uri=self.uri("ranker"), force=self.force))

    def aligned(self) -> Artifact | None:
        if self.recipe.align is None:
            return None
        config = self.recipe.align
        inputs = {name: self.existing(name) for name in ("dataset", "encoder", "ranker")}
        inputs |= {name: self.existing(f"{MAIN_VARIANT}/{name}") for name in ("sid_index", "generator")}
        return self._stage("aligned", config, lambda run: align_generator(config, **inputs, uri=self.uri("aligned"), train=self._train(run), force=self.force))

    def evaluation(self) -> Artifact:
        config = self.recipe.evaluation
        variants = {name: {part: self.existing(f"{name}/{part}") for part in ("quantizer", "sid_index", "generator")} for name in self.recipe.variants}
        return self._stage(
            "evaluation",
            config,
            lambda run: evaluate(
                config,
                dataset=self.existing("dataset"),
                encoder=self.existing("encoder"),
                quantizers={name: parts["quantizer"] for name, parts in variants.items()},
                sid_indexes={name: parts["sid_index"] for name, parts in variants.items()},
                generators={name: parts["generator"] for name, parts in variants.items()},
                ranker=self.existing("ranker"),
                aligned=self._existing_aligned(),
                uri=self.uri("evaluation"),
                force=self.force,
            ),
        )

    def bundle(self) -> Artifact:
        config = self.recipe.bundle
        inputs = {name: self.existing(name) for name in ("dataset", "encoder", "evaluation")}
        inputs |= {name: self.existing(f"{MAIN_VARIANT}/{name}") for name in ("quantizer", "sid_index", "generator")}
        aligned, log = self._existing_aligned(), self._catalogue_log()
        if config.catalog_seq and log is None:
            logger.warning("bundle.catalog_seq=%d is not checked: no catalogue log under %s/catalogue", config.catalog_seq, self.where.home)
        return self._stage("bundle", config, lambda run: build_bundle(config, **inputs, aligned=aligned, uri=self.uri("bundle"), log=log, force=self.force))

    def run_all(self) -> dict[str, Artifact]:
        """Every stage in order, the variants side by side as far as the cluster has room; returns the artifacts by name."""
        self._total = 6 + 3 * len(self.recipe.variants)
        made: dict[str, Artifact] = {"dataset": self.dataset(), "encoder": self.encoder()}
        made |= self._variants()
        for name, stage in (("ranker", self.ranker), ("aligned", self.aligned), ("evaluation", self.evaluation), ("bundle", self.bundle)):
            artifact = stage()
            if artifact is not None:
                made[name] = artifact
        return made

    def _variants(self) -> dict[str, Artifact]:
        """Quantiser, SID index and generator of every variant."""
        active = mlflow.active_run()
        self._parent_run_id = active.info.run_id if active else None

        def branch(variant: str) -> dict[str, Artifact]:
            stages = (("quantizer", self.quantizer), ("sid_index", self.sid_index), ("generator", self.generator))
            return {f"{variant}/{name}": stage(variant) for name, stage in stages}

        made: dict[str, Artifact] = {}
        with ThreadPoolExecutor(fits_at_once(self.recipe.train), thread_name_prefix="variant") as pool:
            branches = [pool.submit(branch, variant) for variant in self.recipe.variants]
            try:
                for done in as_completed(branches):
                    made |= done.result()
            except BaseException:  # an interrupt too: without Ray the other branches end at once, and their checkpoints stay
                pool.shutdown(wait=False, cancel_futures=True)
                ray.shutdown()
                raise
        return made

    def _catalogue_log(self) -> CatalogueLog | None:
        """The log of the model that the line registers, where there is one on this machine's file system."""
        if "://" in self.where.home:
            return None
        log = CatalogueLog(log_folder(f"{self.where.home}/catalogue", self.recipe.registered_name))
        return log if log.folder.is_dir() else None

    def _existing_aligned(self) -> Artifact | None:
        return self.existing("aligned") if self.recipe.align is not None else None

    def _train(self, run_id: str) -> Any:
        return replace(self.recipe.train, tracking_uri=self.where.tracking_uri, tracking_run_id=run_id)

    def _stage(self, name: str, config: Any, make: Callable[[str], Artifact]) -> Artifact:
        """Run one stage inside its MLflow run and say how it went."""
        before = read_manifest(self.uri(name))
        started = time.monotonic()
        place = f"[{next(self._started)}/{self._total}] " if self._total else ""
        logger.info("%s%s ...", place, name)
        with redacting(), stage_run(name, config, tags={"recipe": self.recipe.name}, parent_run_id=self._parent_run_id) as run_id:
            artifact = make(run_id)
            fresh = before is None or before["created"] != artifact.manifest["created"] or before["identity"] != artifact.manifest["identity"]
            tag_stage(artifact, reused=not fresh)
        if fresh:
            logger.info("%s%s done in %.0f s: %s", place, name, time.monotonic() - started, artifact.uri)
        else:
            logger.info("%s%s is up to date: %s", place, name, artifact.uri)
        return artifact


def tag_stage(artifact: Artifact, *, reused: bool) -> None:
    """Record in the active MLflow run what the stage made."""
    mlflow.set_tags({"artifact.uri": artifact.uri, "artifact.hash": artifact.hash, "artifact.reused": str(reused).lower()})
    mlflow.log_metrics({f"rows.{name}": float(count) for name, count in artifact.manifest["row_counts"].items()})


def command_line(
    description: str, argv: list[str] | None = None, *, extra: Mapping[str, Mapping[str, Any]] | None = None
) -> tuple[Pipeline, argparse.Namespace]:
    """Parse a job's command line: `--recipe NAME [--force] [--print-config] key=value ...`.

    Exits with status 2 and all problems where the configuration cannot be used or the registry does not answer, before Ray starts.

    Args:
        extra: further options of the job, name -> `add_argument` keywords.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="marketplace", help=f"one of {', '.join(RECIPES)} (default: marketplace)")
    parser.add_argument("--force", action="store_true", help="redo the stage even where its artifact matches")
    parser.add_argument("--print-config", action="store_true", help="print the whole configuration as JSON and stop")
    for name, keywords in (extra or {}).items():
        parser.add_argument(name, **keywords)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the recipe, e.g. generator.stage2.steps=200")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    quiet_libraries()
    try:
        if arguments.recipe not in RECIPES:
            raise ConfigError([f"--recipe: expected one of {', '.join(RECIPES)}, got {arguments.recipe!r}"])
        recipe = apply_overrides(RECIPES[arguments.recipe](), arguments.overrides)
        where = places()
    except ConfigError as error:
        parser.exit(2, f"{error}\n")
    if arguments.print_config:
        parser.exit(0, json.dumps(to_dict(recipe), indent=2) + "\n")
    try:
        with redacting():
            use_tracking(where)
    except RegistryError as error:
        parser.exit(2, f"{error}\n")
    return Pipeline(recipe, where, force=arguments.force), arguments


def quiet_libraries() -> None:
    """Leave the terminal to our own lines: libraries log warnings and errors only."""
    for name in ("ray", "mlflow", "alembic", "matplotlib", "fontTools", "urllib3", "faiss", "faiss.loader", "bm25s", "fsspec", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)


def register_bundle(pipeline: Pipeline) -> Version:
    """Register the line's bundle under the recipe's name, with the evaluation's headline metrics and the churn of its SIDs."""
    bundle, name = pipeline.existing("bundle"), pipeline.recipe.registered_name
    metrics = headline_metrics(pipeline.existing("evaluation").json("metrics.json"))
    return register(bundle, name, metrics=metrics | churn_since_champion(bundle, name))


def churn_since_champion(bundle: Artifact, model_name: str) -> dict[str, float]:
    """How far the bundle's SIDs are from the champion's, logged and as a metric (see `diagnostics.churn`); {} without a champion whose bundle can be read."""
    try:
        if (champion := current_champion(model_name)) is None:
            return {}
        churn = churn_between(fetch_bundle(champion, MlflowClient()) / "sid_index", bundle.path / "sid_index")
    except (RegistryError, BundleError, ArtifactError, MlflowException, OSError) as error:  # no reason not to register
        logger.warning("churn of the SIDs is not known: %s", redacted(error))
        return {}
    logger.info("%.1f %% of the pairs of items that share a SID in the champion, %s, do not in this bundle (churn)", 100 * churn, champion.text)
    return {"sids/churn_since_champion": churn}


def promote_if_it_passes(version: Version, recipe: Recipe) -> str:
    """Promote a version through the recipe's gates and say in a line what came of it: the aliases that it has now, and why `champion` is not among them."""
    report = promote(version, recipe.registry.gates)
    aliases = ", ".join(aliases_of(version)) or "no alias"
    return aliases if report.passed else f"{aliases}; not promoted: {'; '.join(report.reasons)}"


def example_request(dataset: Artifact) -> str:
    """The body of a request to try the channel with: the query that most test requests ask, the first of equals by alphabet."""
    asked = Counter(query for query in load_requests(dataset, "test", load_catalog(dataset)).queries if query)
    query = min(asked, key=lambda one: (-asked[one], one), default="")
    return json.dumps({"query": query, "limit": 5}, ensure_ascii=False)

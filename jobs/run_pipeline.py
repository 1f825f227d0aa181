"""The whole line: logs and a catalogue in, a registered and (if the gates let it) promoted recall channel out.

    python jobs/run_pipeline.py --recipe marketplace
    ray job submit --runtime-env jobs/runtime_env.yaml -- python jobs/run_pipeline.py --recipe tiny

Stages whose artifacts already match are skipped; a killed training goes on from its last checkpoint.
"""

import shlex

from genrecall.evaluation.results_table import results_table
from genrecall.pipeline import command_line, example_request, promote_if_it_passes, register_bundle
from genrecall.registry.versions import redacting
from genrecall.tracking import stage_run


def main() -> None:
    """Run every stage, register the bundle, try to promote it, say what to do next."""
    pipeline, _ = command_line(__doc__ or "")
    recipe = pipeline.recipe
    with redacting(), stage_run(f"run_pipeline {recipe.name}", recipe, tags={"recipe": recipe.name}):
        artifacts = pipeline.run_all()
        version = register_bundle(pipeline)
        promotion = promote_if_it_passes(version, recipe)
    print(f"\n{results_table(artifacts['evaluation'].json('metrics.json'))}\n")
    print(f"report      {artifacts['evaluation'].path / 'report.html'}")
    print(f"registered  models:/{version.text}   {promotion}")
    print("\nnext:")
    print(f"  make serve MODEL=models:/{version.name}@champion      # answers on http://127.0.0.1:8000")
    print(f"  curl -s http://127.0.0.1:8000/v1/recall -H 'content-type: application/json' -d {shlex.quote(example_request(artifacts['dataset']))}")
    print("  make mlflow                                            # runs, metrics, versions and aliases on http://127.0.0.1:5000")


if __name__ == "__main__":
    main()

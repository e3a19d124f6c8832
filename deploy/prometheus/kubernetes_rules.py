"""Prints deploy/kuberay/base/rules.yaml: the rules of rules.yml for prometheus-operator.

python -m deploy.prometheus.kubernetes_rules > deploy/kuberay/base/rules.yaml
"""

from __future__ import annotations

from pathlib import Path

import yaml

RULES = Path(__file__).resolve().parent / "rules.yml"
HEADER = "# Made by `python -m deploy.prometheus.kubernetes_rules` from deploy/prometheus/rules.yml: change it there.\n"


def text() -> str:
    """The manifest, as YAML."""
    manifest = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "rtdmd", "namespace": "rtdmd"},
        "spec": yaml.safe_load(RULES.read_text(encoding="utf-8")),
    }
    return HEADER + yaml.safe_dump(manifest, sort_keys=False, width=1000, allow_unicode=True)


if __name__ == "__main__":
    print(text(), end="")

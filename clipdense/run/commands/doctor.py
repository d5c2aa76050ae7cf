"""``clipdense doctor``: what is installed, and what is not."""

from __future__ import annotations


def doctor() -> int:
    """Print versions, devices, detectron2's kind, caches, and missing packages.

    The exit status is 1 if a required package is missing.
    """
    from clipdense.run.doctor import examine

    findings = examine()
    width = max(len(finding.topic) for finding in findings) + 2
    for finding in findings:
        print(finding.topic.ljust(width) + finding.value)
        if finding.remedy:
            print(" " * width + f"-> {finding.remedy}")
    missing = [finding.topic for finding in findings if finding.remedy and not finding.optional]
    print(f"missing: {', '.join(missing)}" if missing else "Everything required is installed.")
    return 1 if missing else 0

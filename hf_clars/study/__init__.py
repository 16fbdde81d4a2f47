"""Studies: methods compared at an equal tuning budget, every run kept; and Figure 2's gradient variance.

A study file (`plan.py`) gives runs (`settings.py`), which processes take from each other's leavings (`driver.py`,
`results.py`) and train (`loop.py`, `images.py`, `methods.py`, `rate_plan.py`); rows, tables and pages are made of what
is kept (`rows.py`, `report.py`, `why.py`, `report_files.py`).
"""

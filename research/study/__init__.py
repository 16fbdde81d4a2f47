"""Studies: methods compared at an equal tuning budget, every run kept; and Figure 2's gradient variance.

A study file (`study_file.py`, `plan.py`) gives runs (`settings.py`), which processes share out by their results
(`driver.py`, `results.py`) and train (`loop.py`, `images.py`, `methods.py`, `rate_plan.py`). Rows, tables and
pages are made of what is kept (`rows.py`, `report.py`, `why.py`, `report_files.py`).
"""

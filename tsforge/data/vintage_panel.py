"""From publications to a panel whose windows see what was known at their moment."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tsforge.data.frame import SeriesFrame
from tsforge.data.panel import Panel
from tsforge.data.versions import PanelVersions
from tsforge.data.vintages import History, VintageFrame, later, physical


def panel_of(history: History, frame: SeriesFrame) -> Panel:
    """Return the panel of ``frame`` (columns of ``newest(history)``); windows see what was known at their moment."""
    panel = Panel.from_frame(frame)
    return attach(history, panel) if isinstance(history, VintageFrame) else panel


def attach(vintages: VintageFrame, panel: Panel) -> Panel:
    """Return a panel of ``vintages.latest()`` whose windows see each cell as of the moment of their last context row.

    Columns that are not published (calendar features) stay as they are; so do targets of the horizon.
    """
    rows = vintages.rows
    place = {name: number for number, name in enumerate(panel.series_ids)}
    owner = np.array([place.get(name, -1) for name in rows.series_ids])
    series = np.repeat(np.arange(len(owner)), np.diff(rows.indptr))
    shift = int(panel.grid.index_of(rows.table["time"].head(1))[0]) - int(rows.offset[0])
    index = np.arange(rows.num_rows) - rows.indptr[series] + rows.offset[series] + shift
    mine = owner[series]
    row = panel.indptr[mine] + index - panel.offset[mine]
    there = (mine >= 0) & (row >= panel.indptr[mine]) & (row < panel.indptr[mine + 1])
    row = np.where(there, row, -1)
    present = panel.lengths > 0
    first = int(panel.offset[present].min())
    stop = int((panel.offset + panel.lengths)[present].max())
    moments = physical(later(panel.grid.time_at(np.arange(first, stop)), vintages.delays.targets))
    parts = []
    for number, name in enumerate(panel.schema.columns):
        column = vintages.columns.get(name)
        if column is None:
            continue
        at = row[column.row]
        kept = at >= 0
        due = first + np.searchsorted(moments, column.published[kept])
        parts.append((number, at[kept], due, column.value[kept]))
    return replace(panel, versions=PanelVersions.build(panel.num_rows, parts, first=first, stop=stop))

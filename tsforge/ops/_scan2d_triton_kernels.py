"""Triton kernels of the 2-D selective scan, forward and adjoint; imported on demand by ``_scan2d_triton``.

Written in the terms of the loops, not of time and variates: "outer" is the longer axis of the grid. P is the state that
moves along the outer axis, Q the one that moves along the inner axis (h1 and h2 when time is outer, h2 and h1 when
variates are). With primes for the cell before along the state's own axis and l for the step size there:

    P = P' + e_p P' + g_p (A_pq Q' + B_p x)      P', Q' at (o - 1, i);   e = expm1(l A), g = e / A
    Q = Q' + e_q Q' + g_q (A_qp P' + B_q x)      P', Q' at (o, i - 1)

One program runs the whole grid for one series and one block of channels of one group, on a tile [BLOCK_D, S_P2].

Memory. Cell inputs are in the public layout; complex B and C are interleaved (the imaginary part follows the real one).
States are planes [2, parts, D, S] (P then Q, real then imaginary), where parts is 1 or 2:

    rows    [b, slots, inner, planes]   states of one outer step; segment j of ``every`` steps starts from slot j
    edge    [b, outer, planes]          states at inner index -1
    last    [b, outer, planes]          states at the last inner index
    work    [b, every + 1, inner + 1, planes]  states of one segment: row 0 is the step before it, column 0 the edge
    adjoint [b, inner, planes]          gradient of the states of the outer step last visited
    coef    [6, parts, D, S]            A_p, A_pq, 1 / A_p, A_q, A_qp, 1 / A_q
    d_coef  [b, 4, parts, D, S]         gradients of A_p, A_pq, A_q, A_qp of one series
    d_bc    [blocks, b, N, T, G, S]     gradients of B and C of one block of channels, interleaved like B and C

Every program reads only what it wrote itself; a barrier stands between the outer steps because the compiler may give a
store and a later load different threads. Offsets into cells and rows are int64 (the series index starts them).
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-not-found,import-untyped"

from __future__ import annotations

import triton
import triton.language as tl

# Triton reads the annotations of a jitted function, so only tl.constexpr may stand there.


@triton.jit
def _mul(ar, ai, br, bi, COMPLEX: tl.constexpr):
    """Return a b; a real product has a meaningless second part, here and below."""
    re = ar * br
    im = re
    if COMPLEX:
        re = re - ai * bi
        im = ar * bi + ai * br
    return re, im


@triton.jit
def _mul_conj(ar, ai, br, bi, COMPLEX: tl.constexpr):
    """Return a conj(b)."""
    re = ar * br
    im = re
    if COMPLEX:
        re = re + ai * bi
        im = ai * br - ar * bi
    return re, im


@triton.jit
def _expm1_real(z):
    """Return exp(z) - 1: a Taylor polynomial below 1/2, where the subtraction would cancel."""
    if z.dtype == tl.float64:
        p = z * (1.0 / 87178291200.0) + (1.0 / 6227020800.0)
        p = z * p + (1.0 / 479001600.0)
        p = z * p + (1.0 / 39916800.0)
        p = z * p + (1.0 / 3628800.0)
        p = z * p + (1.0 / 362880.0)
        p = z * p + (1.0 / 40320.0)
    else:
        p = z * 0.0 + (1.0 / 40320.0)
    p = z * p + (1.0 / 5040.0)
    p = z * p + (1.0 / 720.0)
    p = z * p + (1.0 / 120.0)
    p = z * p + (1.0 / 24.0)
    p = z * p + (1.0 / 6.0)
    p = z * p + 0.5
    p = z * p + 1.0
    return tl.where(tl.abs(z) < 0.5, z * p, tl.exp(z) - 1.0)


@triton.jit
def _expm1(zr, zi, COMPLEX: tl.constexpr):
    """Return exp(z) - 1; cos - 1 = -2 sin^2(half) keeps small turns exact."""
    re = _expm1_real(zr)
    im = re
    if COMPLEX:
        half_sin = tl.sin(zi * 0.5)
        half_cos = tl.cos(zi * 0.5)
        drop = half_sin * half_sin * 2.0
        im = (re + 1.0) * half_sin * half_cos * 2.0
        re = re - (re + 1.0) * drop
    return re, im


@triton.jit
def _load(ptr, offset, mask, plane, COMPLEX: tl.constexpr):
    """Return real and imaginary part, ``plane`` apart; lanes outside are zero."""
    re = tl.load(ptr + offset, mask=mask, other=0.0)
    im = re
    if COMPLEX:
        im = tl.load(ptr + offset + plane, mask=mask, other=0.0)
    return re, im


@triton.jit
def _load_states(ptr, lane, plane, COMPLEX: tl.constexpr):
    """Return P and Q (real, imaginary each) of one set of planes."""
    pr, pi = _load(ptr, lane[2], lane[3], plane, COMPLEX)
    if COMPLEX:
        qr, qi = _load(ptr + 2 * plane, lane[2], lane[3], plane, COMPLEX)
    else:
        qr, qi = _load(ptr + plane, lane[2], lane[3], plane, COMPLEX)
    return pr, pi, qr, qi


@triton.jit
def _store_states(ptr, states, lane, plane, COMPLEX: tl.constexpr):
    """Store P and Q as one set of planes."""
    tl.store(ptr + lane[2], states[0], mask=lane[3])
    if COMPLEX:
        tl.store(ptr + plane + lane[2], states[1], mask=lane[3])
        tl.store(ptr + 2 * plane + lane[2], states[2], mask=lane[3])
        tl.store(ptr + 3 * plane + lane[2], states[3], mask=lane[3])
    else:
        tl.store(ptr + plane + lane[2], states[2], mask=lane[3])


@triton.jit
def _place(sizes, S: tl.constexpr, S_P2: tl.constexpr, BLOCK_D: tl.constexpr, COMPLEX: tl.constexpr):
    """Return series (int64), group, block and the lanes of this program.

    Lanes: channels [BLOCK_D], offset of a state in B [S_P2] and in a plane [BLOCK_D, S_P2], and the masks of planes,
    channels and states.
    """
    pid = tl.program_id(0)
    block = pid % sizes[7]
    group = (pid // sizes[7]) % sizes[5]
    series = (pid // (sizes[7] * sizes[5])).to(tl.int64)
    per_group = sizes[4] // sizes[5]
    local = block * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = local < per_group
    channel = group * per_group + local
    state = tl.arange(0, S_P2)
    vector = state * 2 if COMPLEX else state
    by_state = channel[:, None] * S + state[None, :]
    mask = inside[:, None] & (state[None, :] < S)
    return series, group, block, (channel, vector, by_state, mask, inside, state < S)


@triton.jit
def _coefficients(coef, lane, plane, COMPLEX: tl.constexpr):
    """Return A, A_cross and 1 / A of one state, real and imaginary part each."""
    if COMPLEX:
        ar, ai = _load(coef, lane[2], lane[3], plane, COMPLEX)
        cr, ci = _load(coef + 2 * plane, lane[2], lane[3], plane, COMPLEX)
        ir, ii = _load(coef + 4 * plane, lane[2], lane[3], plane, COMPLEX)
    else:
        ar, ai = _load(coef, lane[2], lane[3], plane, COMPLEX)
        cr, ci = _load(coef + plane, lane[2], lane[3], plane, COMPLEX)
        ir, ii = _load(coef + 2 * plane, lane[2], lane[3], plane, COMPLEX)
    return ar, ai, cr, ci, ir, ii


@triton.jit
def _cell_inputs(inputs, cell, group, lane, D, G, S: tl.constexpr, COMPLEX: tl.constexpr):
    """Return x, dt_p, dt_q, B_p, B_q (real, imaginary) of a cell."""
    x = tl.load(inputs[0] + cell * D + lane[0], mask=lane[4], other=0.0)[:, None]
    dt_p = tl.load(inputs[1] + cell * D + lane[0], mask=lane[4], other=0.0)[:, None]
    dt_q = tl.load(inputs[2] + cell * D + lane[0], mask=lane[4], other=0.0)[:, None]
    vector = (cell * G + group) * S
    if COMPLEX:
        vector = vector * 2
    bpr, bpi = _load(inputs[3] + vector, lane[1], lane[5], 1, COMPLEX)
    bqr, bqi = _load(inputs[4] + vector, lane[1], lane[5], 1, COMPLEX)
    return x, dt_p, dt_q, bpr[None, :], bpi[None, :], bqr[None, :], bqi[None, :]


@triton.jit
def _cell_outputs_map(inputs, cell, group, lane, G, S: tl.constexpr, COMPLEX: tl.constexpr):
    """Return C_p, C_q (real, imaginary) of a cell."""
    vector = (cell * G + group) * S
    if COMPLEX:
        vector = vector * 2
    cpr, cpi = _load(inputs[5] + vector, lane[1], lane[5], 1, COMPLEX)
    cqr, cqi = _load(inputs[6] + vector, lane[1], lane[5], 1, COMPLEX)
    return cpr[None, :], cpi[None, :], cqr[None, :], cqi[None, :]


@triton.jit
def _step(own, other, x, dt, drive, coef, COMPLEX: tl.constexpr):
    """Return the new state, e, g and the forcing f = A_cross other + B x; coef is (A, A_cross, 1 / A)."""
    er, ei = _expm1(dt * coef[0], dt * coef[1], COMPLEX)
    gr, gi = _mul(er, ei, coef[4], coef[5], COMPLEX)
    fr, fi = _mul(coef[2], coef[3], other[0], other[1], COMPLEX)
    fr = fr + drive[0] * x
    fi = fi + drive[1] * x
    kr, ki = _mul(er, ei, own[0], own[1], COMPLEX)
    nr, ni = _mul(gr, gi, fr, fi, COMPLEX)
    return own[0] + (kr + nr), own[1] + (ki + ni), er, ei, gr, gi, fr, fi


@triton.jit
def forward(
    inputs,
    outputs,
    sizes,
    S: tl.constexpr,
    S_P2: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COMPLEX: tl.constexpr,
    HAS_EDGE: tl.constexpr,
    HAS_LAST: tl.constexpr,
):
    """Run the recurrence over the grid.

    inputs: x, dt_p, dt_q, B_p, B_q, C_p, C_q, coef, edge; outputs: y, rows (slot 0 given), last; sizes: outer, inner,
    cells from one outer (inner) step to the next, D, G, every, blocks of channels in a group.
    """
    series, group, _block, lane = _place(sizes, S, S_P2, BLOCK_D, COMPLEX)
    outer, inner, D, every = sizes[0], sizes[1], sizes[4], sizes[6]
    plane = D * S
    planes = plane * 2
    if COMPLEX:
        planes = plane * 4
    coef_p = _coefficients(inputs[7], lane, plane, COMPLEX)
    coef_q = _coefficients(inputs[7] + planes // 2 * 3, lane, plane, COMPLEX)
    slots = (outer + every - 1) // every + 1
    for o in range(0, outer):
        before = outputs[1] + (series * slots + (o + every - 1) // every) * inner * planes
        after = outputs[1] + (series * slots + o // every + 1) * inner * planes
        pr = tl.zeros_like(coef_p[0])
        pi = pr
        qr = pr
        qi = pr
        if HAS_EDGE:
            pr, pi, qr, qi = _load_states(inputs[8] + (series * outer + o) * planes, lane, plane, COMPLEX)
        for i in range(0, inner):
            cell = series * outer * inner + o * sizes[2] + i * sizes[3]
            x, dt_p, dt_q, bpr, bpi, bqr, bqi = _cell_inputs(inputs, cell, group, lane, D, sizes[5], S, COMPLEX)
            cpr, cpi, cqr, cqi = _cell_outputs_map(inputs, cell, group, lane, sizes[5], S, COMPLEX)
            lpr, lpi, lqr, lqi = _load_states(before + i * planes, lane, plane, COMPLEX)
            step_p = _step((lpr, lpi), (lqr, lqi), x, dt_p, (bpr, bpi), coef_p, COMPLEX)
            step_q = _step((qr, qi), (pr, pi), x, dt_q, (bqr, bqi), coef_q, COMPLEX)
            pr, pi, qr, qi = step_p[0], step_p[1], step_q[0], step_q[1]
            _store_states(after + i * planes, (pr, pi, qr, qi), lane, plane, COMPLEX)
            y = cpr * pr + cqr * qr
            if COMPLEX:
                y = y - cpi * pi - cqi * qi
            tl.store(outputs[0] + cell * D + lane[0], tl.sum(y, axis=1), mask=lane[4])
        if HAS_LAST:
            _store_states(outputs[2] + (series * outer + o) * planes, (pr, pi, qr, qi), lane, plane, COMPLEX)
        tl.debug_barrier()


@triton.jit
def _recompute(
    inputs,
    scope,
    segment,
    lane,
    coef_p,
    coef_q,
    sizes,
    S: tl.constexpr,
    COMPLEX: tl.constexpr,
    HAS_EDGE: tl.constexpr,
):
    """Fill ``work`` with the states of one segment; scope: series, group, rows, work (both of the series)."""
    outer, inner, D, every = sizes[0], sizes[1], sizes[4], sizes[6]
    plane = D * S
    planes = plane * 2
    if COMPLEX:
        planes = plane * 4
    series, group, rows, work = scope[0], scope[1], scope[2], scope[3]
    for i in range(0, inner):
        start = _load_states(rows + (segment * inner + i) * planes, lane, plane, COMPLEX)
        _store_states(work + (i + 1) * planes, start, lane, plane, COMPLEX)
    tl.debug_barrier()
    low = segment * every
    for o in range(low, tl.minimum(low + every, outer)):
        before = work + (o - low) * (inner + 1) * planes
        after = before + (inner + 1) * planes
        pr = tl.zeros_like(coef_p[0])
        pi = pr
        qr = pr
        qi = pr
        if HAS_EDGE:
            pr, pi, qr, qi = _load_states(inputs[8] + (series * outer + o) * planes, lane, plane, COMPLEX)
        _store_states(after, (pr, pi, qr, qi), lane, plane, COMPLEX)
        for i in range(0, inner):
            cell = series * outer * inner + o * sizes[2] + i * sizes[3]
            x, dt_p, dt_q, bpr, bpi, bqr, bqi = _cell_inputs(inputs, cell, group, lane, D, sizes[5], S, COMPLEX)
            left = _load_states(before + (i + 1) * planes, lane, plane, COMPLEX)
            new_p = _step((left[0], left[1]), (left[2], left[3]), x, dt_p, (bpr, bpi), coef_p, COMPLEX)
            new_q = _step((qr, qi), (pr, pi), x, dt_q, (bqr, bqi), coef_q, COMPLEX)
            pr, pi, qr, qi = new_p[0], new_p[1], new_q[0], new_q[1]
            _store_states(after + (i + 1) * planes, (pr, pi, qr, qi), lane, plane, COMPLEX)
        tl.debug_barrier()


@triton.jit
def _half_adjoint(grad_r, grad_i, own, other, x, dt, b, coef, COMPLEX: tl.constexpr):
    """Return what one state of a cell sends back for the gradient of its new value.

    In order: gradients of own and other before (4), of x and dt (each to be summed over s), of B (2, to be summed over
    channels), of A and A_cross (4).
    """
    _nr, _ni, er, ei, gr, gi, fr, fi = _step(own, other, x, dt, b, coef, COMPLEX)
    mr, mi = _mul_conj(grad_r, grad_i, gr, gi, COMPLEX)  # gradient of the forcing
    kr, ki = _mul_conj(grad_r, grad_i, er, ei, COMPLEX)
    cr, ci = _mul_conj(mr, mi, coef[2], coef[3], COMPLEX)
    grown = er + 1.0  # exp(dt A); its imaginary part is that of e
    # d new / d dt = exp(dt A) (A own + f)
    hr, hi = _mul(coef[0], coef[1], own[0], own[1], COMPLEX)
    wr, wi = _mul(grown, ei, hr + fr, hi + fi, COMPLEX)
    d_dt, _zero = _mul_conj(grad_r, grad_i, wr, wi, COMPLEX)
    # d new / d A = dt exp(dt A) own + (dt exp(dt A) - g) / A f
    ur, ui = _mul(dt * grown - gr, dt * ei - gi, coef[4], coef[5], COMPLEX)
    vr, vi = _mul(ur, ui, fr, fi, COMPLEX)
    tr, ti = _mul(grown, ei, own[0], own[1], COMPLEX)
    ar, ai = _mul_conj(grad_r, grad_i, vr + dt * tr, vi + dt * ti, COMPLEX)
    xr, xi = _mul_conj(mr, mi, other[0], other[1], COMPLEX)
    d_x, _zero = _mul_conj(mr, mi, b[0], b[1], COMPLEX)
    return grad_r + kr, grad_i + ki, cr, ci, d_x, d_dt, mr * x, mi * x, ar, ai, xr, xi


@triton.jit
def _store_vector(ptr, re, im, state, S: tl.constexpr, COMPLEX: tl.constexpr):
    """Store the sum over channels of a tile, interleaved when complex."""
    if COMPLEX:
        tl.store(ptr + 2 * state, tl.sum(re, axis=0), mask=state < S)
        tl.store(ptr + 2 * state + 1, tl.sum(im, axis=0), mask=state < S)
    else:
        tl.store(ptr + state, tl.sum(re, axis=0), mask=state < S)


@triton.jit
def _adjoint_row(
    inputs,
    outputs,
    scope,
    place,
    carried,
    coef_p,
    coef_q,
    sizes,
    S: tl.constexpr,
    COMPLEX: tl.constexpr,
):
    """Go backwards through one outer step; returns the gradients of its edge (4) and of A (8, added to those carried).

    scope: series, group, outer step, rows of work before and at it, gradients of the states of the step; place:
    states [S_P2], lanes, offset of the block in d_bc; carried: gradients of the states
    that come from ``last`` (4) and of A (8).
    """
    inner, D, G = sizes[1], sizes[4], sizes[5]
    state, lane = place[0], place[1]
    plane = D * S
    planes = plane * 2
    parts = 1
    if COMPLEX:
        planes = plane * 4
        parts = 2
    ipr, ipi, iqr, iqi = carried[0], carried[1], carried[2], carried[3]
    apr, api, xpr, xpi = carried[4], carried[5], carried[6], carried[7]
    aqr, aqi, xqr, xqi = carried[8], carried[9], carried[10], carried[11]
    pr, pi, qr, qi = _load_states(scope[4] + inner * planes, lane, plane, COMPLEX)
    for back in range(0, inner):
        i = inner - 1 - back
        cell = scope[0] * sizes[0] * inner + scope[2] * sizes[2] + i * sizes[3]
        x, dt_p, dt_q, bpr, bpi, bqr, bqi = _cell_inputs(inputs, cell, scope[1], lane, D, G, S, COMPLEX)
        cpr, cpi, cqr, cqi = _cell_outputs_map(inputs, cell, scope[1], lane, G, S, COMPLEX)
        gy = tl.load(inputs[9] + cell * D + lane[0], mask=lane[4], other=0.0)[:, None]
        lpr, lpi, lqr, lqi = _load_states(scope[3] + (i + 1) * planes, lane, plane, COMPLEX)
        upr, upi, uqr, uqi = _load_states(scope[4] + i * planes, lane, plane, COMPLEX)
        opr, opi, oqr, oqi = _load_states(scope[5] + i * planes, lane, plane, COMPLEX)
        vector = place[2] + (cell * G + scope[1]) * S * parts
        _store_vector(outputs[5] + vector, gy * pr, -gy * pi, state, S, COMPLEX)  # C: y = Re C h
        _store_vector(outputs[6] + vector, gy * qr, -gy * qi, state, S, COMPLEX)
        to_p = _half_adjoint(
            opr + ipr + gy * cpr, opi + ipi - gy * cpi, (lpr, lpi), (lqr, lqi), x, dt_p, (bpr, bpi), coef_p, COMPLEX
        )
        to_q = _half_adjoint(
            oqr + iqr + gy * cqr, oqi + iqi - gy * cqi, (uqr, uqi), (upr, upi), x, dt_q, (bqr, bqi), coef_q, COMPLEX
        )
        _store_states(scope[5] + i * planes, (to_p[0], to_p[1], to_p[2], to_p[3]), lane, plane, COMPLEX)
        iqr, iqi, ipr, ipi = to_q[0], to_q[1], to_q[2], to_q[3]
        tl.store(outputs[0] + cell * D + lane[0], tl.sum(to_p[4] + to_q[4], axis=1), mask=lane[4])
        tl.store(outputs[1] + cell * D + lane[0], tl.sum(to_p[5], axis=1), mask=lane[4])
        tl.store(outputs[2] + cell * D + lane[0], tl.sum(to_q[5], axis=1), mask=lane[4])
        _store_vector(outputs[3] + vector, to_p[6], to_p[7], state, S, COMPLEX)
        _store_vector(outputs[4] + vector, to_q[6], to_q[7], state, S, COMPLEX)
        apr, api, xpr, xpi = apr + to_p[8], api + to_p[9], xpr + to_p[10], xpi + to_p[11]
        aqr, aqi, xqr, xqi = aqr + to_q[8], aqi + to_q[9], xqr + to_q[10], xqi + to_q[11]
        pr, pi, qr, qi = upr, upi, uqr, uqi
    return ipr, ipi, iqr, iqi, apr, api, xpr, xpi, aqr, aqi, xqr, xqi


@triton.jit
def backward(
    inputs,
    outputs,
    sizes,
    S: tl.constexpr,
    S_P2: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COMPLEX: tl.constexpr,
    HAS_EDGE: tl.constexpr,
    HAS_LAST: tl.constexpr,
):
    """Run the adjoint, segment by segment from the last to the first, after recomputing each segment's states.

    inputs: as ``forward``, then the gradients of y and of ``last``, and rows; outputs: gradients of x, dt_p, dt_q, of
    B_p, B_q, C_p, C_q (by block of channels), d_coef, gradient of edge, adjoint (in: gradient of the states of the
    last outer step, out: of those before the first one), work; sizes: as ``forward``, then the size
    of a block in d_bc.
    """
    series, group, block, lane = _place(sizes, S, S_P2, BLOCK_D, COMPLEX)
    outer, inner, D, every = sizes[0], sizes[1], sizes[4], sizes[6]
    plane = D * S
    planes = plane * 2
    if COMPLEX:
        planes = plane * 4
    coef_p = _coefficients(inputs[7], lane, plane, COMPLEX)
    coef_q = _coefficients(inputs[7] + planes // 2 * 3, lane, plane, COMPLEX)
    segments = (outer + every - 1) // every
    rows = inputs[11] + series * (segments + 1) * inner * planes
    work = outputs[10] + series * (every + 1) * (inner + 1) * planes
    adjoint = outputs[9] + series * inner * planes
    place = (tl.arange(0, S_P2), lane, block.to(tl.int64) * sizes[8])
    apr = tl.zeros_like(coef_p[0])
    api, xpr, xpi, aqr, aqi, xqr, xqi = apr, apr, apr, apr, apr, apr, apr
    for past in range(0, segments):
        segment = segments - 1 - past
        _recompute(inputs, (series, group, rows, work), segment, lane, coef_p, coef_q, sizes, S, COMPLEX, HAS_EDGE)
        low = segment * every
        steps = tl.minimum(low + every, outer) - low
        for gone in range(0, steps):
            row = steps - 1 - gone
            o = low + row
            before = work + row * (inner + 1) * planes
            after = before + (inner + 1) * planes
            ipr = tl.zeros_like(apr)
            ipi, iqr, iqi = ipr, ipr, ipr
            if HAS_LAST:
                ipr, ipi, iqr, iqi = _load_states(inputs[10] + (series * outer + o) * planes, lane, plane, COMPLEX)
            carried = (ipr, ipi, iqr, iqi, apr, api, xpr, xpi, aqr, aqi, xqr, xqi)
            scope = (series, group, o, before, after, adjoint)
            ipr, ipi, iqr, iqi, apr, api, xpr, xpi, aqr, aqi, xqr, xqi = _adjoint_row(
                inputs, outputs, scope, place, carried, coef_p, coef_q, sizes, S, COMPLEX
            )
            if HAS_EDGE:
                _store_states(outputs[8] + (series * outer + o) * planes, (ipr, ipi, iqr, iqi), lane, plane, COMPLEX)
            tl.debug_barrier()
    d_coef = outputs[7] + series * planes * 2
    _store_states(d_coef, (apr, api, xpr, xpi), lane, plane, COMPLEX)
    _store_states(d_coef + planes, (aqr, aqi, xqr, xqi), lane, plane, COMPLEX)

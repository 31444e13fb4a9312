"""Panels of a report's figures, drawn and looked at."""


def drawn(panel):
    """The canvas of a panel, laid out."""
    canvas = panel.canvas()
    canvas.canvas.draw()
    return canvas


def cut_texts(canvas):
    """Texts of a panel that reach over its edge by more than a pixel."""
    edge = canvas.bbox
    boxes = [(text.get_text(), text.get_window_extent()) for text in drawn_texts(canvas)]
    return [
        words
        for words, box in boxes
        if min(box.x0, box.y0) < -1 or box.x1 > edge.x1 + 1 or box.y1 > edge.y1 + 1
    ]


def drawn_texts(canvas):
    """All texts that are drawn, ticks' labels beyond an axis' ends left out."""
    axes_there = [*canvas.axes, *(child for axes in canvas.axes for child in axes.child_axes)]
    for legend in canvas.legends:
        yield from legend.get_texts()
    for axes in axes_there:
        texts = list(axes.texts)
        titles = [axes.title, axes._left_title, axes._right_title]
        texts += titles
        if axes.get_legend():
            texts += axes.get_legend().get_texts()
        if axes.axison:
            texts += [axes.xaxis.label, axes.yaxis.label]
            for labels, place, limits in (
                (axes.get_xticklabels(), 0, axes.get_xlim()),
                (axes.get_yticklabels(), 1, axes.get_ylim()),
            ):
                low, high = min(limits), max(limits)
                texts += [t for t in labels if low <= t.get_position()[place] <= high]
        yield from (text for text in texts if text.get_visible() and text.get_text().strip())


def covered(canvas):
    """Texts of a panel's axes that its legend lies over."""
    legends = [*canvas.legends, *(a.get_legend() for a in canvas.axes if a.get_legend())]
    boxes = [legend.get_window_extent() for legend in legends]
    inside = {id(text) for legend in legends for text in legend.get_texts()}
    return [
        text.get_text()
        for text in drawn_texts(canvas)
        for box in boxes
        if id(text) not in inside and text.get_window_extent().padded(-1).overlaps(box)
    ]

"""How paces and times are said, the same in progress lines, bars and `hsivi watch`."""


def duration(seconds: float) -> str:
    """As 45 s, 3 min 20 s, 2 h 05 min or 3 d 4 h."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s" if whole < 600 else f"{round(whole / 60)} min"
    minutes = round(whole / 60)
    return (
        f"{minutes // 60} h {minutes % 60:02d} min"
        if minutes < 2880
        else f"{minutes // 1440} d {minutes % 1440 // 60} h"
    )


def pace(seconds_per_step: float) -> str:
    """As 12 s/step, 0.52 s/step or 35 steps/s."""
    if seconds_per_step >= 10:
        return f"{seconds_per_step:.0f} s/step"
    if seconds_per_step >= 0.1:
        return f"{seconds_per_step:.2f} s/step"
    return f"{1 / max(seconds_per_step, 1e-9):.0f} steps/s"


def figure(value: float) -> str:
    """A metric, in four digits."""
    return f"{value:.4g}"

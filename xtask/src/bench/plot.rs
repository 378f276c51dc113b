//! The shares of native speed as bars, in SVG.

use std::fmt::Write as _;

use super::{Speeds, ratio};

/// Pixels: where bars start, how long native speed is, the height of a row.
const LEFT: f64 = 130.0;
const WIDTH: f64 = 460.0;
const ROW: f64 = 30.0;

/// Two bars a row, ours above QEMU's; the line is native speed. What is faster ends at the edge, and
/// each bar has its number behind it.
pub fn svg(speeds: &Speeds, cpus: u8) -> String {
    let height = 56.0 + ROW * speeds.native.len() as f64;
    let mut text = format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" width="720" height="{height}" viewBox="0 0 720 {height}" font-family="sans-serif" font-size="12">
<style>
text {{ fill: #24292f }} line {{ stroke: #8c959f }} .t {{ fill: #0969da }} .q {{ fill: #bf8700 }}
@media (prefers-color-scheme: dark) {{ text {{ fill: #e6edf3 }} .t {{ fill: #58a6ff }} .q {{ fill: #d29922 }} }}
</style>
<text x="{LEFT}" y="18">Share of native speed, {cpus} VCPUs</text>
<rect class="t" x="370" y="8" width="12" height="12"/><text x="388" y="18">Trapline</text>
<rect class="q" x="460" y="8" width="12" height="12"/><text x="478" y="18">QEMU TCG</text>
"##
    );
    for (n, name) in speeds.native.keys().enumerate() {
        let top = 34.0 + ROW * n as f64;
        let _ = writeln!(
            text,
            r#"<text x="{}" y="{}" text-anchor="end">{name}</text>"#,
            LEFT - 8.0,
            top + 16.0
        );
        for (class, rates, y) in [("t", &speeds.ours, top), ("q", &speeds.theirs, top + 12.0)] {
            let share = ratio(name, rates, &speeds.native);
            let label = match share {
                Some(share) if share < 0.1 => format!("{:.1} %", 100.0 * share),
                Some(share) => format!("{:.0} %", 100.0 * share),
                None if rates.get(name) == Some(&0.0) => "wrong result".to_owned(),
                None => continue,
            };
            let width = WIDTH * share.unwrap_or(0.0).min(1.1);
            let _ = writeln!(
                text,
                r#"<rect class="{class}" x="{LEFT}" y="{y}" width="{width:.1}" height="11"/><text x="{:.1}" y="{}" font-size="10">{label}</text>"#,
                LEFT + width + 4.0,
                y + 9.0
            );
        }
    }
    let (native, end) = (LEFT + WIDTH, height - 16.0);
    let _ = write!(
        text,
        r#"<line x1="{native}" y1="30" x2="{native}" y2="{end}" stroke-dasharray="3 3"/><text x="{native}" y="{}" text-anchor="middle">native</text>
</svg>
"#,
        height - 4.0
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::Rates;

    #[test]
    fn bars_are_as_long_as_the_shares() {
        let of = |rate: f64| Rates::from([("sort".to_owned(), rate)]);
        let speeds = Speeds {
            native: of(8.0),
            ours: of(4.0),
            theirs: of(0.0),
            ..Speeds::default()
        };
        let text = svg(&speeds, 2);
        assert!(text.contains(r#"width="230.0""#), "{text}");
        assert!(
            text.contains("50 %") && text.contains("wrong result"),
            "{text}"
        );
    }
}

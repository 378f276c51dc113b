//! The monitor console: a prompt on the terminal for commands to the machine.

use std::io::{self, Write};
use std::sync::Arc;

use trapline_machine::Control;
use trapline_machine::control::{Command, HELP};

const PROMPT: &str = "(trapline) ";
const LONGEST_LINE: usize = 1024;

const BACKSPACE: u8 = 0x08;
const DELETE: u8 = 0x7f;
/// Ctrl-C and Ctrl-U.
const DISCARD: [u8; 2] = [0x03, 0x15];

/// A line that is being typed, and whom it is for. What it says goes to standard error, so that
/// standard output has the guest's alone.
pub struct Monitor<W> {
    control: Arc<Control>,
    line: Vec<u8>,
    active: bool,
    out: W,
}

impl Monitor<io::Stderr> {
    pub fn new(control: Arc<Control>) -> Self {
        Self::with_output(control, io::stderr())
    }
}

impl<W: Write> Monitor<W> {
    fn with_output(control: Arc<Control>, out: W) -> Self {
        Self {
            control,
            line: Vec::new(),
            active: false,
            out,
        }
    }

    /// Whether what is typed is for the monitor.
    pub fn is_active(&self) -> bool {
        self.active
    }

    /// From the guest to the monitor, or back.
    pub fn toggle(&mut self) {
        self.active = !self.active;
        self.line.clear();
        if self.active {
            self.say("\ntrapline's monitor: help for commands, Ctrl-A c for the guest\n");
            self.say(PROMPT);
        } else {
            self.say("\n");
        }
    }

    /// Says something. If nobody can read it, there is nobody to tell.
    fn say(&mut self, text: &str) {
        let _ = self.out.write_all(text.as_bytes());
        let _ = self.out.flush();
    }

    /// A byte that was typed for the monitor.
    pub fn key(&mut self, byte: u8) {
        match byte {
            b'\r' | b'\n' => {
                self.say("\n");
                let line = std::mem::take(&mut self.line);
                let answer = self.answer(&String::from_utf8_lossy(&line));
                if !answer.is_empty() {
                    self.say(&answer);
                    self.say("\n");
                }
                self.say(PROMPT);
            }
            BACKSPACE | DELETE if self.line.pop().is_some() => self.say("\x08 \x08"),
            _ if DISCARD.contains(&byte) => {
                self.line.clear();
                self.say("\n");
                self.say(PROMPT);
            }
            b' '..=b'~' if self.line.len() < LONGEST_LINE => {
                self.line.push(byte);
                let _ = self.out.write_all(&[byte]);
                let _ = self.out.flush();
            }
            // Other control keys do nothing, and commands have no other letters.
            _ => {}
        }
    }

    /// What a line gives.
    fn answer(&self, line: &str) -> String {
        match line.trim() {
            "" => return String::new(),
            "help" | "?" | "h" => return HELP.into(),
            _ => {}
        }
        let command: Command = match line.parse() {
            Ok(command) => command,
            Err(error) => return error.to_string(),
        };
        match self.control.execute(command) {
            Ok(reply) => reply.to_string(),
            Err(error) => error.to_string(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn monitor() -> Monitor<Vec<u8>> {
        let mut monitor = Monitor::with_output(Arc::default(), Vec::new());
        monitor.toggle();
        monitor.out.clear();
        monitor
    }

    /// What is shown when these keys are typed.
    fn shown(keys: &[u8]) -> String {
        let mut monitor = monitor();
        keys.iter().for_each(|&key| monitor.key(key));
        String::from_utf8(monitor.out).unwrap()
    }

    #[test]
    fn lines_are_edited() {
        assert_eq!(shown(b"ab\x7f\x7f\x7f"), "ab\x08 \x08\x08 \x08");
        assert!(shown(b"junk\x15help\r").contains("watch add SPEC"));
        assert!(shown(b"hx\x7felp\r").contains("watch add SPEC"));
        assert!(shown(b"\x1b[A\r").contains("'[A'"));
        assert_eq!(shown(b"\r"), format!("\n{PROMPT}"));
    }

    #[test]
    fn errors_are_a_line() {
        assert!(shown(b"jump\r").contains("'jump' is no command"));
        assert!(shown(b"pause\r").contains("no machine runs"));
        assert!(shown(b"watch list\r").contains("[]"));
    }

    proptest! {
        #[test]
        fn no_keys_panic(keys in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut monitor = monitor();
            keys.iter().for_each(|&key| monitor.key(key));
        }
    }
}
